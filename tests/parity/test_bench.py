"""The benchmark against TRL: a tiny case gives numbers of both sides, and the losses agree. Nothing here is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from bench.against_trl import compare
from bench.cases import Case
from bench.cuda_7b import COLUMNS, make_model, make_pairs, rows

TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@pytest.mark.slow
@pytest.mark.parametrize(("finetuning", "reference"), [("lora", "cached"), ("full", "live")])
def test_both_sides_are_told_and_agree(
    tmp_path: Path, finetuning: Literal["lora", "full"], reference: Literal["cached", "live"]
) -> None:
    model = make_model(tmp_path / "model", TINY, "cpu", torch.float32)
    pairs = make_pairs(tmp_path / "data", 20, (12, 6, 6), 0.5, TINY.vocab_size)
    case = Case("tiny", pairs, finetuning, reference, steps=2, batch=4, model=model, target=1.0)
    result = compare(case, rounds=1, warmup=1, work=tmp_path / "work", timeout=300)
    assert not result.skipped and not result.failed("trl") and not result.failed("dsdpo")
    runs = result.rounds[0]
    assert all(len(run.seconds) == len(run.losses) == 2 and len(run.memory_gb) == 1 for run in runs.values())
    assert all((run.reference_seconds is not None) == (reference == "cached") for run in runs.values())
    np.testing.assert_allclose(runs["trl"].losses, runs["dsdpo"].losses, atol=1e-5)
    assert runs["trl"].losses[0] == pytest.approx(np.log(2)) and runs["trl"].losses[1] != runs["trl"].losses[0]
    assert result.cells()[0] == "tiny" and any("losses agree" in line for line in result.verdicts())
    told = rows(result, TINY, np.array(result.lengths), peak=1.0)
    assert [line[1] for line in told] == ["trl", "dsdpo"] and all(len(line) == len(COLUMNS) for line in told)


def test_a_case_without_its_data_is_skipped(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", TINY, "cpu", torch.float32)
    pairs = make_pairs(tmp_path / "data", 4, (12, 6, 6), 0.5, TINY.vocab_size)
    (tmp_path / "data" / "pairs.jsonl").unlink()
    result = compare(Case("gone", pairs, "lora", "cached", model=model), 1, 1, tmp_path, 60)
    assert result.skipped and "pairs.jsonl" in result.verdicts()[0]
