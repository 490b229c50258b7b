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
from bench.flops import Shape, step_flops

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


def test_flops_of_llama_2_7b_are_what_its_size_says() -> None:
    """6 N T for long enough rows of a model of 6.6e9 weights in its layers and head."""
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    shape = Shape.of(llama, lora_rank=0)
    assert shape.linear == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    pair = np.array([[0, 100, 100]])
    attention = 12 * 32 * 4096 * 100**2
    head = 6 * 4096 * llama.vocab_size * 200
    assert step_flops(shape, pair, True, full=True, live=False) == 6 * shape.linear * 200 + attention + head
    prompted = np.array([[300, 100, 100]])
    shared, twice = (step_flops(shape, prompted, s, full=True, live=False) for s in (True, False))
    assert 0.6 < shared / twice < 0.65, "500 tokens in place of 800"
