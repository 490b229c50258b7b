"""The prepared set on disk: Arrow shards that are memory-mapped, and a manifest written last.

    <set>/examples-00000.arrow   Arrow files of SHARD_ROWS examples in batches of BATCH_ROWS; only the last are shorter
    <set>/dropped_rows.jsonl     one object per dropped record: source, code, reason, detail, remedy, excerpt
    <set>/prompt_keys.npy        uint64 for each example, equal for equal prompts; sets of earlier versions lack it
    <set>/splits                 indices of val_size, see split.py
    <set>/manifest.json          counts, settings, fingerprint

Where an example lies is arithmetic, so opening costs the same for any number of examples.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dsdpo.data.example import DIGEST, DIGEST_BYTES, Lengths, TokenizedExample
from dsdpo.data.order import permute
from dsdpo.data.split import PROMPT_KEYS, load_rows, prompt_key, split_folder
from dsdpo.runtime.files import fsync_path

MANIFEST = "manifest.json"
DROPPED_ROWS = "dropped_rows.jsonl"
# Raise it when shards are written in another way. It is part of a set's folder name, not of its fingerprint: the
# examples are the same, and so a run continues.
SHARD_FORMAT = 2
BATCH_ROWS = 1024
SHARD_ROWS = 64 * BATCH_ROWS
SCHEMA = pa.schema(
    [
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("completion_ids", pa.list_(pa.list_(pa.int32()))),
        pa.field("loss_mask", pa.list_(pa.list_(pa.bool_()))),  # null: every token of the completions is scored
        pa.field("prompt_length", pa.int32()),
        pa.field("completion_lengths", pa.list_(pa.int32())),
        pa.field("loss_tokens", pa.list_(pa.int32())),
        pa.field("digest", pa.binary(DIGEST_BYTES)),
        pa.field("scores", pa.list_(pa.float64())),  # NaN where the record has none
        pa.field("weight", pa.float64()),
        pa.field("source", pa.string()),
    ]
)

_OPEN_BATCHES = 256  # a record batch is a view of the map: a few KB of Python objects, no data
_SPLIT_KEY = 2**32 - 1  # an epoch number that training never reaches, so that the split has an order of its own


def _shard_name(number: int) -> str:
    return f"examples-{number:05d}.arrow"


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
    """A column's values as pa.Array.to_numpy gives them, which imports pandas: and threads import nothing.

    Numbers are not copied; bool is.
    """
    if pa.types.is_boolean(column.type):
        first, last = column.offset // 8, (column.offset + len(column) + 7) // 8
        packed = np.frombuffer(column.buffers()[1] or b"", np.uint8)[first:last]
        return np.unpackbits(packed, bitorder="little")[column.offset % 8 :][: len(column)].astype(bool)
    kind = np.dtype(str(column.type).replace("double", "float64"))
    return np.frombuffer(column.buffers()[1] or b"", kind, count=len(column), offset=column.offset * kind.itemsize)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start+1, … of each range, one range after another: int64 [sum of sizes]."""
    before = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(starts - before, sizes)


def _split_lists(lists: pa.ListScalar) -> tuple[np.ndarray, ...]:
    """The inner lists of one value of a list of lists."""
    inner = lists.values
    offsets = _view(inner.offsets)
    values = inner.values.slice(offsets[0], offsets[-1] - offsets[0])  # flatten() would import pyarrow.compute
    return tuple(np.split(_view(values), offsets[1:-1] - offsets[0]))


@dataclass(frozen=True)
class SetIdentity:
    """What a prepared set was made from.

    Attributes:
        fingerprint: of all that its token ids depend on.
        earlier_fingerprints: those that earlier versions gave the same inputs, by version.
        template_date: the day that its chat template writes as today's, or None.
    """

    fingerprint: str
    earlier_fingerprints: Mapping[int, str] = field(default_factory=dict)
    template_date: str | None = None


class PreparedSet:
    """Prepared examples 0 ... n-1, read from memory-mapped shards.

    Opening reads the manifest alone; shards are mapped when first used.

    Args:
        path: the set's folder.
        split: `train` or `eval`.
        held_out: examples that val_size asks to hold out of this set; `eval` is these, `train` the others. None: no
            such split.
        seed: key of that split.
        by_prompt: whether prompts are held out with all of their examples; the split's index must be there.
    """

    def __init__(
        self, path: Path, split: str = "train", held_out: int | None = None, seed: int = 0, by_prompt: bool = False
    ) -> None:
        self.path = path
        self.split = split
        self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        self.held_out = held_out
        self._seed = seed
        self._index = load_rows(split_folder(path, held_out or 0, seed), split) if by_prompt else None
        self._total = int(self.manifest["examples"])
        self._readers: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self._batches: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """Changes with the examples, their order or the split."""
        return self._with_split(str(self.manifest["fingerprint"]))

    @property
    def earlier_fingerprints(self) -> dict[int, str]:
        """Version of the preparation -> what `fingerprint` was in it; without those that made other examples."""
        return {int(key): self._with_split(base) for key, base in self.manifest["earlier_fingerprints"].items()}

    @property
    def template_date(self) -> str | None:
        """The day that the chat template writes as today's, as YYYY-MM-DD; None where it writes none."""
        return self.manifest.get("template_date")

    @property
    def end_token(self) -> str | None:
        """The token that ends the completions, where it is known."""
        return self.manifest.get("end_token")

    def _with_split(self, base: str) -> str:
        if self.held_out is None:
            return base
        by_prompt = "" if self._index is None else "-prompt"
        return f"{base}-{self.split}{by_prompt}-{self.held_out}-{self._seed}"

    def __len__(self) -> int:
        if self._index is not None:
            return len(self._index)
        if self.held_out is None:
            return self._total
        return self.held_out if self.split == "eval" else self._total - self.held_out

    @property
    def sizes(self) -> list[int]:
        """Examples of each data set, whose ids stand one set after another; of one split by `example`, of all."""
        whole = self.manifest.get("examples_of_sets", [self._total])
        if self.held_out is None:
            return whole
        if self._index is None:
            return [len(self)]
        return np.diff(np.searchsorted(self._index, np.cumsum([0, *whole]))).tolist()

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Example ids of this split -> rows of the shards: by a mapped index, or by a keyed permutation."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"example ids must lie in 0 ... {len(self) - 1}, got {ids.min()} ... {ids.max()}")
        if self._index is not None:
            return self._index[ids].astype(np.int64)
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
        """(record batch, row in it) of an example."""
        number, at = divmod(int(self._rows(np.array([index]))[0]), BATCH_ROWS)
        return self._batch(number), at

    def _by_batch(self, ids: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
        """Each record batch that holds some of `ids`: it, the rows in it, and their places in `ids`."""
        numbers, at = np.divmod(self._rows(ids), BATCH_ROWS)
        order = np.argsort(numbers, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
        for part in parts if len(order) else []:
            yield self._batch(int(numbers[part[0]])), at[part], part

    def _lists(self, ids: np.ndarray, column: str, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """A list column: sizes of the lists, int64 [len(ids)], and their values one after another."""
        sizes = np.zeros(len(ids), dtype=np.int64)
        found = []
        for batch, at, places in self._by_batch(ids):
            lists = batch.column(column)
            offsets = _view(lists.offsets)
            sizes[places] = offsets[at + 1] - offsets[at]
            found.append((_view(lists.values), offsets[at].astype(np.int64), places))
        starts = np.cumsum(sizes) - sizes
        values = np.empty(sizes.sum(), dtype=dtype)
        for source, first, places in found:
            values[_ranges(starts[places], sizes[places])] = source[_ranges(first, sizes[places])]
        return sizes, values

    def lengths(self, ids: np.ndarray) -> Lengths:
        """Tokens of the examples."""
        prompt = np.empty(len(ids), dtype=np.int64)
        for batch, at, places in self._by_batch(ids):
            prompt[places] = _view(batch.column("prompt_length"))[at]
        counts, completions = self._lists(ids, "completion_lengths", np.int64)
        return Lengths(prompt, counts, completions, self._lists(ids, "loss_tokens", np.int64)[1])

    def digests(self, ids: np.ndarray) -> np.ndarray:
        """What stands for the examples' token ids in the reference store: DIGEST [len(ids)]."""
        found = np.empty(len(ids), dtype=DIGEST)
        for batch, at, places in self._by_batch(ids):
            found[places] = _digest_view(batch.column("digest"))[at]
        return found

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """The ratings of all completions that came with the examples: float64 [N], NaN where none did."""
        return self._lists(ids, "scores", np.float64)[1]

    def weights(self, ids: np.ndarray) -> np.ndarray:
        """The factor on each example's loss: float64 [len(ids)]."""
        found = np.empty(len(ids), dtype=np.float64)
        for batch, at, places in self._by_batch(ids):
            found[places] = _view(batch.column("weight"))[at]
        return found

    def prompt_keys(self) -> Iterator[np.ndarray]:
        """What stands for the prompts of all shard rows, in order: uint64, equal for equal prompts, in parts."""
        if (path := self.path / PROMPT_KEYS).exists():
            yield np.load(path, mmap_mode="r")
            return
        for number in range(-(-self._total // BATCH_ROWS)):  # a set of an earlier version
            prompts = self._batch(number).column("prompt_ids")
            offsets, ids = _view(prompts.offsets), _view(prompts.values)
            texts = (ids[start:end].tobytes().hex() for start, end in itertools.pairwise(offsets))
            yield np.array([prompt_key(text) for text in texts], dtype=np.uint64)

    def example(self, index: int) -> TokenizedExample:
        """Token ids of one example: int64 arrays, its mask bool."""
        batch, at = self._locate(index)
        prompt_ids = _view(batch.column("prompt_ids")[at].values).astype(np.int64)
        completions = _split_lists(batch.column("completion_ids")[at])
        mask = batch.column("loss_mask")[at]
        return TokenizedExample(
            prompt_ids,
            tuple(ids.astype(np.int64) for ids in completions),
            _split_lists(mask) if mask.is_valid else None,
        )

    def first_token_from(self, size: int) -> tuple[int, int]:
        """The first example with a token id of `size` or above, and that id; its whole is read up to there."""
        for index in range(len(self)):
            example = self.example(index)
            for ids in (example.prompt_ids, *example.completion_ids):
                if (found := ids[ids >= size]).size:
                    return index, int(found[0])
        raise ValueError(f"no token id reaches {size}")

    def where(self, index: int) -> str:
        """Where an example comes from: `file.jsonl:17`."""
        batch, at = self._locate(index)
        return str(batch.column("source")[at].as_py())
