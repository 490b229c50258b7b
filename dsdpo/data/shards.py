"""The prepared set on disk: Arrow shards that are memory-mapped, and a manifest written last.

    <set>/pairs-00000.arrow   Arrow files of SHARD_ROWS pairs in batches of BATCH_ROWS; only the last are shorter
    <set>/rejected.jsonl      one object per refused row: source, reason, excerpt
    <set>/manifest.json       counts, settings, fingerprint

Where a pair lies is arithmetic, so opening costs the same for any number of pairs.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dsdpo.data.digest import DIGEST, DIGEST_BYTES
from dsdpo.data.order import permute
from dsdpo.data.packing import TokenPair

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
BATCH_ROWS = 1024
SHARD_ROWS = 64 * BATCH_ROWS
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
LENGTHS = ("prompt_length", "chosen_length", "rejected_length")
SCORES = ("chosen_score", "rejected_score")
SCHEMA = pa.schema(
    [pa.field(name, pa.list_(pa.int32())) for name in IDS]
    + [pa.field(name, pa.int32()) for name in LENGTHS]
    + [pa.field("digest", pa.binary(DIGEST_BYTES))]
    + [pa.field(name, pa.float64()) for name in SCORES]
    + [pa.field("source", pa.string())]
)

_OPEN_BATCHES = 256  # a record batch is a view of the map: a few KB of Python objects, no data
_SPLIT_KEY = 2**32 - 1  # an epoch number that training never reaches, so that the split has an order of its own


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shard_name(number: int) -> str:
    return f"pairs-{number:05d}.arrow"


def _full_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly BATCH_ROWS, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= BATCH_ROWS:
            merged = pa.concat_batches(waiting)
            full = rows // BATCH_ROWS * BATCH_ROWS
            yield from (merged.slice(start, BATCH_ROWS) for start in range(0, full, BATCH_ROWS))
            waiting, rows = [merged.slice(full)], rows - full
    if rows:
        yield pa.concat_batches(waiting)


def write_shards(batches: Iterable[pa.RecordBatch], folder: Path) -> None:
    """Write batches of SCHEMA, of any size, as the shards of a set; fsynced."""
    full = _full_batches(batches)
    for number in itertools.count():
        shard = list(itertools.islice(full, 1))
        if not shard:
            return
        path = folder / _shard_name(number)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in itertools.chain(shard, itertools.islice(full, SHARD_ROWS // BATCH_ROWS - 1)):
                writer.write_batch(batch)
        fsync_path(path)


def _digest_view(column: pa.Array) -> np.ndarray:
    """The column's bytes as records, without a copy; NumPy knows no fixed-size bytes that Arrow would give as such."""
    return np.frombuffer(column.buffers()[1], DIGEST, count=len(column), offset=column.offset * DIGEST_BYTES)


def _view(column: pa.Array) -> np.ndarray:
    """A column of numbers without a copy, as pa.Array.to_numpy gives it, which imports pandas."""
    kind = np.dtype(str(column.type).replace("double", "float64"))
    return np.frombuffer(column.buffers()[1], kind, count=len(column), offset=column.offset * kind.itemsize)


def _with_nan(column: pa.Array) -> np.ndarray:
    """NaN for null; that takes a copy of the batch's column where there is a null."""
    values = _view(column)
    if not column.null_count:
        return values
    bits = np.unpackbits(np.frombuffer(column.buffers()[0], np.uint8), bitorder="little")
    return np.where(bits[column.offset : column.offset + len(column)], values, np.nan)


class PreparedSet:
    """Prepared pairs 0 ... n-1, read from memory-mapped shards.

    Opening reads the manifest alone; shards are mapped when first used.

    Args:
        path: the set's folder.
        split: `train` or `eval`.
        held_out: pairs that val_size holds out of this set; `eval` is these, `train` the others. None: no such split.
        seed: key of that split.
    """

    def __init__(self, path: Path, split: str = "train", held_out: int | None = None, seed: int = 0) -> None:
        self.path = path
        self.split = split
        self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        self.held_out = held_out
        self._seed = seed
        self._total = int(self.manifest["pairs"])
        self._readers: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self._batches: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """Changes with the pairs, their order or the split."""
        base = str(self.manifest["fingerprint"])
        return base if self.held_out is None else f"{base}-{self.split}-{self.held_out}-{self._seed}"

    def __len__(self) -> int:
        if self.held_out is None:
            return self._total
        return self.held_out if self.split == "eval" else self._total - self.held_out

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Pair ids of this split -> rows of the shards, by a keyed permutation: no table, whatever the size."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"pair ids must lie in 0 ... {len(self) - 1}, got {ids.min()} ... {ids.max()}")
        if self.held_out is None:
            return ids
        positions = ids if self.split == "eval" else ids + self.held_out
        return permute(positions, self._total, self._seed, _SPLIT_KEY)

    def _batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number` of the set: rows number * BATCH_ROWS and on."""
        batch = self._batches.get(number)
        if batch is None:
            shard, index = divmod(number, SHARD_ROWS // BATCH_ROWS)
            if shard not in self._readers:
                self._readers[shard] = pa.ipc.open_file(pa.memory_map(str(self.path / _shard_name(shard))))
            batch = self._batches[number] = self._readers[shard].get_batch(index)
            if len(self._batches) > _OPEN_BATCHES:
                self._batches.popitem(last=False)
        return batch

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        """(record batch, row in it) of a pair."""
        number, at = divmod(int(self._rows(np.array([index]))[0]), BATCH_ROWS)
        return self._batch(number), at

    def _gather(
        self, ids: np.ndarray, columns: Sequence[str], view: Callable[[pa.Array], np.ndarray], into: np.ndarray
    ) -> np.ndarray:
        """Fill `into` [len(ids), len(columns)] from the columns' values, each record batch looked up once."""
        numbers, at = np.divmod(self._rows(ids), BATCH_ROWS)
        order = np.argsort(numbers, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
        for part in parts if len(order) else []:
            batch = self._batch(int(numbers[part[0]]))
            for column, name in enumerate(columns):
                into[part, column] = view(batch.column(name))[at[part]]
        return into

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Prompt, chosen and rejected tokens of the pairs: int64 [len(ids), 3]."""
        return self._gather(ids, LENGTHS, _view, np.empty((len(ids), len(LENGTHS)), dtype=np.int64))

    def digests(self, ids: np.ndarray) -> np.ndarray:
        """What stands for the pairs' token ids in the reference store: DIGEST [len(ids)]."""
        return self._gather(ids, ["digest"], _digest_view, np.empty((len(ids), 1), dtype=DIGEST)).reshape(-1)

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """The ratings of chosen and rejected that came with the pairs: float64 [len(ids), 2], NaN where none did."""
        return self._gather(ids, SCORES, _with_nan, np.empty((len(ids), len(SCORES)), dtype=np.float64))

    def pair(self, index: int) -> TokenPair:
        """Token ids of one pair: int64 arrays."""
        batch, at = self._locate(index)
        return TokenPair(*(_view(batch.column(name)[at].values).astype(np.int64) for name in IDS))

    def where(self, index: int) -> str:
        """Where a pair comes from: `file.jsonl:17`."""
        batch, at = self._locate(index)
        return str(batch.column("source")[at].as_py())
