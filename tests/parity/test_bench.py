"""The benchmark against TRL: a tiny case gives numbers of both sides, and the losses agree. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from bench.against_trl import compare
from bench.cases import Case
from bench.cuda_7b import COLUMNS, TINY, main, make_model, make_pairs, rows


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


@pytest.mark.slow
def test_the_bench_for_gpus_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All four sides of a case with a tiny model, from the command line to the table and the file."""
    line = ["--device", "cpu", "--quick", "--cases", "7b-lora-cached-*", "--steps", "3", "--work", str(tmp_path)]
    main([*line, "--json", str(tmp_path / "found.json")])
    table = [row.split() for row in capsys.readouterr().out.splitlines() if row.startswith("7b-lora-cached-long ")]
    assert [row[1] for row in table] == ["dsdpo", "dsdpo_equal", "trl", "trl_best"]
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert len(found["ratios"]) == len(found["ratios_to_best"]) == 1
    runs = found["rounds"][0]
    assert all(len(run["seconds"]) == 3 and run["start_seconds"] > 0 for run in runs.values())
    assert (runs["trl"]["micro_pairs"], runs["trl_best"]["micro_pairs"]) == (2, 4)
    np.testing.assert_allclose(runs["trl_best"]["losses"], runs["dsdpo_equal"]["losses"], atol=1e-5)
