"""Examples of any K, written as shards and read back. tests/unit/data/test_prepare.py has memory, and whole sets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dsdpo.data.encode import shard_row
from dsdpo.data.example import Lengths, TokenizedExample
from dsdpo.data.shards import MANIFEST, SCHEMA, PreparedSet, write_shards
from tests.helpers.tiny import ListOfExamples, random_examples

N = 53
COUNTS = (1, 2, 16, 3, 1, 7)
BATCH = 8


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of 8 rows to a shard: two shards, the last batch short."""
    monkeypatch.setattr("dsdpo.data.shards.BATCH_ROWS", BATCH)
    monkeypatch.setattr("dsdpo.data.shards.SHARD_ROWS", 4 * BATCH)


@pytest.fixture
def examples() -> list[TokenizedExample]:
    return random_examples(N, COUNTS, seed=2, masks=True, empty=True)


@pytest.fixture
def scores(examples: list[TokenizedExample]) -> list[list[float | None]]:
    """A third of the completions have none."""
    rng = np.random.default_rng(5)
    return [[None if rng.random() < 0.3 else rng.normal() for _ in example.completion_ids] for example in examples]


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(6).choice([0.0, 0.25, 1.0, 3.0], size=N)


@pytest.fixture
def folder(
    tmp_path: Path, examples: list[TokenizedExample], scores: list[list[float | None]], weights: np.ndarray
) -> Path:
    rows = []
    for i, example in enumerate(examples):
        mask = None if example.loss_mask is None else [mask.tolist() for mask in example.loss_mask]
        completions = [ids.tolist() for ids in example.completion_ids]
        row = shard_row(example.prompt_ids.tolist(), completions, scores[i], float(weights[i]), mask)
        rows.append({**row, "source": f"f:{i}"})
    batches = [pa.RecordBatch.from_pylist(rows[start : start + 11], schema=SCHEMA) for start in range(0, N, 11)]
    write_shards(batches, tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"examples": N, "fingerprint": "x"}))
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    return tmp_path


def assert_same(found: TokenizedExample, expected: TokenizedExample) -> None:
    assert found.prompt_ids.dtype == np.int64 and np.array_equal(found.prompt_ids, expected.prompt_ids)
    assert [ids.tolist() for ids in found.completion_ids] == [ids.tolist() for ids in expected.completion_ids]
    assert all(ids.dtype == np.int64 for ids in found.completion_ids)
    assert (found.loss_mask is None) == (expected.loss_mask is None)
    for mask, wanted in zip(found.loss_mask or (), expected.loss_mask or (), strict=True):
        assert mask.dtype == np.bool_ and np.array_equal(mask, wanted)


def assert_lengths(found: Lengths, expected: Lengths) -> None:
    for name, array in vars(expected).items():
        assert getattr(found, name).dtype == np.int64 and np.array_equal(getattr(found, name), array), name


def test_each_example_is_read_back(folder: Path, examples: list[TokenizedExample]) -> None:
    prepared = PreparedSet(folder)
    assert {len(example.completion_ids) for example in examples} == set(COUNTS)
    assert len({example.loss_mask is None for example in examples}) == 2
    for i in np.random.default_rng(0).permutation(N):
        assert_same(prepared.example(int(i)), examples[i])
        assert prepared.where(int(i)) == f"f:{i}"


@pytest.mark.parametrize("size", [0, 1, 7, 200])
def test_columns_are_those_of_the_examples_in_any_order(
    folder: Path,
    examples: list[TokenizedExample],
    scores: list[list[float | None]],
    weights: np.ndarray,
    size: int,
) -> None:
    """Ids may be asked for twice."""
    prepared, memory = PreparedSet(folder), ListOfExamples(examples)
    ids = np.random.default_rng(size).integers(0, N, size)
    assert_lengths(prepared.lengths(ids), Lengths.of([examples[i] for i in ids]))
    assert np.array_equal(prepared.digests(ids), memory.digests(ids))
    assert np.array_equal(prepared.weights(ids), weights[ids])
    wanted = [math.nan if score is None else score for i in ids for score in scores[i]]
    assert prepared.scores(ids).dtype == np.float64
    assert np.array_equal(prepared.scores(ids), np.array(wanted, dtype=np.float64), equal_nan=True)


def test_held_out_examples_are_read_as_well(folder: Path, examples: list[TokenizedExample]) -> None:
    seen = []
    for split, n in (("train", N - 20), ("eval", 20)):
        prepared = PreparedSet(folder, split, held_out=20, seed=3)
        assert len(prepared) == n
        origin = [int(prepared.where(i).removeprefix("f:")) for i in range(n)]
        ids = np.random.default_rng(1).permutation(n)
        assert_lengths(prepared.lengths(ids), Lengths.of([examples[origin[i]] for i in ids]))
        for i in ids:
            assert_same(prepared.example(int(i)), examples[origin[i]])
        seen += origin
    assert sorted(seen) == list(range(N))


def test_an_example_touches_its_own_record_batch_alone(folder: Path, examples: list[TokenizedExample]) -> None:
    prepared = PreparedSet(folder)
    assert_same(prepared.example(44), examples[44])
    assert list(prepared._batches) == [44 // BATCH] and len(prepared._readers) == 1


def test_each_column_has_a_type_of_fixed_place(folder: Path, examples: list[TokenizedExample]) -> None:
    """Loss tokens and lengths stand beside the ids, so that a batch is planned without reading any."""
    reader = pa.ipc.open_file(folder / "examples-00001.arrow")
    assert reader.schema == SCHEMA and reader.num_record_batches == 3
    row = reader.get_batch(1).to_pylist()[2]
    example = examples[4 * BATCH + BATCH + 2]
    assert row["loss_tokens"] == example.loss_tokens
    assert row["completion_lengths"] == [len(ids) for ids in example.completion_ids]
