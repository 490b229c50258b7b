"""Reference log-probs on disk, found again only for the same weights, token ids and settings.

`<cache_dir>/reference/<key>/` belongs to one reference: the key is a hash of its weights and of every setting that
changes a log-prob. Inside, chunks hold entries by example: a 128-bit digest of its token ids and loss mask, and for
each of its K completions the log-probs in two sums, over the places that all completions have and over the rest (so
that every `ld_alpha` is served). So the order of the data, the learning rate or beta do not matter, and a grown set
computes its new examples only. A chunk is named by the hash of its content and appears by rename: a damaged or
half-written one is as if it were absent, and two jobs can fill one store at once. The examples of a chunk have the
same K.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dsdpo.data.example import DIGEST
from dsdpo.runtime.files import write_atomically


def store_key(settings: dict[str, object]) -> str:
    """Name of a reference: a hash of what determines its log-probs (weights, precision, layout, attention)."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


class ReferenceStore:
    """One reference's log-probs by example digest.

    Args:
        folder: `<cache_dir>/reference/<key>`; made when the first chunk is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests = np.empty(0, dtype=DIGEST)
        self._starts = np.empty(0, dtype=np.int64)
        self._logps = np.empty((0, 2), dtype=np.float32)

    def reload(self) -> None:
        """Read every chunk that is there and whole."""
        chunks = [chunk for path in sorted(self.folder.glob("*.safetensors")) if (chunk := _read_chunk(path))]
        if not chunks:
            return
        digests = np.concatenate([chunk["digests"] for chunk in chunks]).view(DIGEST).reshape(-1)
        counts = np.concatenate([np.full(len(chunk["logps"]), chunk["logps"].shape[1]) for chunk in chunks])
        self._logps = np.concatenate([chunk["logps"].reshape(-1, 2) for chunk in chunks])
        self._digests, first = np.unique(digests, return_index=True)
        self._starts = (np.cumsum(counts) - counts)[first]

    def find(self, wanted: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look digests up.

        Args:
            wanted: DIGEST [B], as a prepared set gives them.
            counts: int64 [B], completions of each example; N together. An entry of a digest has as many.

        Returns:
            found, bool [B]; logps, fp32 [N, 2] of all completions in their two sums, NaN where not found.
        """
        logps = np.full((counts.sum(), 2), np.nan, dtype=np.float32)
        if len(self._digests) == 0:
            return np.zeros(len(wanted), dtype=bool), logps
        at = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        found = self._digests[at] == wanted
        number = np.arange(len(logps)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each completion
        there = np.repeat(found, counts)
        logps[there] = self._logps[(np.repeat(self._starts[at], counts) + number)[there]]
        return found, logps

    def write_chunks(self, digests: np.ndarray, counts: np.ndarray, logps: np.ndarray) -> None:
        """Add entries, a chunk for each number of completions. Visible to others at once or never.

        Args:
            digests: DIGEST [B].
            counts: int64 [B], completions of each example.
            logps: fp32 [N, 2].
        """
        for count in np.unique(counts):
            own = counts == count
            values = logps[np.repeat(own, counts)].reshape(-1, count, 2)
            entries = {"digests": digests[own].view("<u8").reshape(-1, 2), "logps": values.astype(np.float32)}
            content = safetensors.numpy.save(entries)
            write_atomically(self.folder / f"{_content_name(content)}.safetensors", content)


def _content_name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _read_chunk(path: Path) -> dict[str, np.ndarray] | None:
    """A chunk's arrays, or None when its content is not what its name says."""
    content = path.read_bytes()
    if _content_name(content) != path.stem:
        return None
    try:
        return safetensors.numpy.load(content)
    except SafetensorError:
        return None
