"""Making a prepared set: read, encode in worker processes, count, write.

A set is written into a temporary folder, its manifest last, and renamed: a folder with its final name is whole. Two
processes may prepare the same set at once; the first to rename wins and both use it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.data.account import check_fatal, check_first_records, note_missing
from dsdpo.data.encode import CUT_BOTH, Limits, RowEncoder
from dsdpo.data.folders import INFO_FILE
from dsdpo.data.formats.tell import with_formatting
from dsdpo.data.mismatched import with_mismatched
from dsdpo.data.pipeline import encode
from dsdpo.data.registry import DatasetEntry
from dsdpo.data.shards import DROPPED_ROWS, MANIFEST, SCHEMA, SetIdentity, write_shards
from dsdpo.data.split import PROMPT_KEYS
from dsdpo.data.tally import Tally, too_many
from dsdpo.data.template_files import template_place
from dsdpo.data.templates import ExampleEncoder
from dsdpo.errors import DataError
from dsdpo.runtime.files import fsync_path, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ABANDONED_S = 2 * 24 * 3600


def make_set(
    config: RunConfig,
    entries: list[DatasetEntry],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    identity: SetIdentity,
) -> None:
    """Write a prepared set.

    Args:
        config: the run.
        entries: the sets, in order.
        tokenizer: of the model.
        path: the set's folder; it appears whole or not at all. Another process may make it at the same time.
        identity: of the set.

    Raises:
        ConfigError: the template does not fit the tokenizer or the data.
        DataError: more than max_refused of the records are dropped, or none is left; the dropped ones then stand in
            `<path>.dropped_rows.jsonl`.
        OSError: the file system refused a write.
    """
    encoder = ExampleEncoder(
        tokenizer,
        template_place(config.template, config.model_source.hub),
        config.default_system,
        identity.template_date,
        config.mask_thinking,
    )
    rows = RowEncoder(
        encoder,
        [with_formatting(entry, config) for entry in entries],
        Limits.of(config),
        config.mask_history,
        STAGES[config.stage].records == "texts",
    )
    ends = [check_first_records(rows, entry, config.max_samples) for entry in rows.entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        counts = _write(rows, config, temporary)
        _check_refused(config, counts, temporary / DROPPED_ROWS, path.with_suffix(".dropped_rows.jsonl"))
        if CUT_BOTH in counts["notes"]:  # version 3 dropped such records
            earlier = {version: known for version, known in identity.earlier_fingerprints.items() if version != 3}
            identity = replace(identity, earlier_fingerprints=earlier)
        described = [f"{entry.name} ({entry.formatting})" for entry in rows.entries]
        end = next((end for end in ends if end is not None), None)
        manifest = {**asdict(identity), "end_token": end, "datasets": described, **_settings(config), **counts}
        write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
        _publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(rows: RowEncoder, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Encode all records, write the accepted ones as shards, list the others; the counts."""
    (folder / "work").mkdir(parents=True)
    keys = _Keys(folder / "work" / "keys")
    with (folder / DROPPED_ROWS).open("w") as stream:
        tally = Tally(stream, len(rows.entries))
        encoded = encode(rows, config.max_samples, config.preprocessing_num_workers, folder / "work" / "records.arrow")
        accepted = _accepted(encoded, tally, keys)
        if STAGES[config.stage].records == "labelled":
            accepted = with_mismatched(accepted, config.max_length)
        write_shards(accepted, folder)
    fsync_path(folder / DROPPED_ROWS)
    keys.save(folder / PROMPT_KEYS)
    shutil.rmtree(folder / "work")
    counts = tally.counts()
    if counts["rows"]:
        counts["notes"] |= note_missing(rows.entries, tally.has)
    return counts


def _accepted(encoded: Iterator[pa.RecordBatch], tally: Tally, keys: _Keys) -> Iterator[pa.RecordBatch]:
    """The accepted records of counted batches, in the columns of a shard."""
    for batch in encoded:
        check_fatal(batch)
        tally.add(batch)
        kept = batch.filter(pc.equal(batch.column("reason"), ""))
        keys.add(kept.column("prompt_key"))
        yield kept.select(SCHEMA.names).cast(SCHEMA)


class _Keys:
    """The keys of all prompts, collected in a file: their number is known at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def add(self, keys: pa.Array) -> None:
        """Append some."""
        with self._path.open("ab") as stream:
            stream.write(np.array(keys.to_pylist(), np.uint64).tobytes())  # to_numpy would import pandas

    def save(self, path: Path) -> None:
        """Write them as a NumPy array."""
        collected = np.memmap(self._path, np.uint64, "r") if self._path.stat().st_size else np.empty(0, np.uint64)
        np.save(path, collected)
        fsync_path(path)


def _settings(config: RunConfig) -> dict[str, Any]:
    kept = ("model_name_or_path", "template", "default_system", "max_length", "truncation_mode", "max_samples")
    return {"settings": {name: getattr(config, name) for name in kept}}


def _check_refused(config: RunConfig, counts: dict[str, Any], dropped: Path, keep_at: Path) -> None:
    """Raise DataError when too many records are dropped; their list then stays at `keep_at`."""
    n_refused = sum(counts["refused"].values())
    if counts["examples"] > 0 and n_refused <= config.max_refused * counts["rows"]:
        keep_at.unlink(missing_ok=True)
        return
    os.replace(dropped, keep_at)
    raise DataError(too_many(counts, config.max_refused, str(keep_at), INFO_FILE))


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished set its name. Another process that was faster has made the same."""
    fsync_path(temporary)
    try:
        os.rename(temporary, path)
    except OSError:
        if not (path / MANIFEST).exists():
            raise
    fsync_path(path.parent)


def _remove_abandoned(path: Path) -> None:
    """Delete what killed processes left days ago, of this set and of others beside it."""
    for folder in path.parent.glob(".*.tmp"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)
