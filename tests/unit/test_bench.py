"""What the bench for GPUs decides without running anything."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from bench.cases import Case, Pairs, Side
from bench.cuda_7b import CASES, LENGTHS, QUICK_CASES, TINY_LENGTHS, memory_verdict, options
from bench.report import Result
from bench.settings import run_config
from bench.sides import Bench, Run

CASE = Case(
    "tiny",
    Pairs("pairs.jsonl", Path("."), 64),
    "lora",
    "cached",
    batch=8,
    trl_accumulation=4,
    sides=("trl", "trl_best", "dsdpo", "dsdpo_equal"),
)


@dataclass
class SmallGpu(Bench):
    """Two pairs fit."""

    tried: list[int] = field(default_factory=list)

    def _trl(self, side: Side, pairs: int) -> Run:
        self.tried.append(pairs)
        why = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB" if pairs > 2 else None
        return Run(side, failed=why, micro_pairs=pairs)


def bench(lengths: list[list[int]] = [[10, 3, 4]]) -> SmallGpu:  # noqa: B006
    return SmallGpu(CASE, Path("."), np.array(lengths), 60, False)


def test_the_largest_micro_batch_that_fits_is_found_once() -> None:
    gpu = bench()
    assert gpu.run("trl_best").micro_pairs == 2 and gpu.tried == [8, 4, 2]
    assert gpu.run("trl_best").micro_pairs == 2 and gpu.tried == [8, 4, 2, 2]
    assert gpu.run("trl").micro_pairs == 2


def test_another_failure_is_not_tried_again() -> None:
    class Broken(SmallGpu):
        def _trl(self, side: Side, pairs: int) -> Run:
            self.tried.append(pairs)
            return Run(side, failed="KeyError: model")

    gpu = Broken(CASE, Path("."), np.array([[1, 1, 1]]), 60, False)
    assert gpu.run("trl_best").failed and gpu.tried == [8]


def test_a_row_for_equal_memory_holds_the_longest_pairs() -> None:
    assert CASE.micro_pairs == 2
    assert bench([[100, 30, 40], [1, 1, 1], [20, 2, 2], [50, 5, 5]]).equal_row_tokens == 170 + 60
    assert bench([[1, 1, 1]]).equal_row_tokens == 2 * 64  # dsdpo takes no shorter rows


def test_memory_is_judged_at_equal_pairs() -> None:
    runs = {side: Run(side, memory_gb=[gb]) for side, gb in zip(CASE.sides, (10.0, 30.0, 20.0, 5.0))}
    result = Result(CASE, 0, rounds=[runs])  # type: ignore[arg-type]
    assert memory_verdict(result) == "tiny: 0.50 of TRL's memory with 2 pairs each, target 0.6 reached"
    assert "MISSED" in str(memory_verdict(result, target=0.4))
    assert memory_verdict(Result(replace(CASE, sides=("trl", "dsdpo")), 0, rounds=[runs])) is None  # type: ignore[arg-type]


def test_every_case_has_a_name_and_lengths_of_its_own() -> None:
    assert len({row.name for row in CASES}) == len(CASES) and set(QUICK_CASES) <= set(CASES)
    assert {row.lengths for row in CASES} == set(LENGTHS) == set(TINY_LENGTHS)
    assert {row.finetuning for row in CASES} == {"lora", "qlora", "full"}
    assert sum(LENGTHS["8k"].tokens) == 8192
    for lengths in (*LENGTHS.values(), *TINY_LENGTHS.values()):
        assert lengths.on(1) == lengths
        for gpus in (2, 3, 8):
            step = lengths.on(gpus).batch
            assert step >= lengths.batch and step % (gpus * lengths.micro_pairs) == 0


def test_quick_is_one_round_of_a_few_steps() -> None:
    asked = options(["--quick", "--device", "cpu", "--rounds", "3"])
    assert (asked.layers, asked.steps, asked.rounds, asked.gpus) == (16, 5, 1, 1)
    assert options(["--device", "cpu"]).layers == 32
    assert (asked.seconds, options(["--quick", "--device", "cpu", "--seconds", "60"]).seconds) == (math.inf, 60)
    with pytest.raises(SystemExit):
        options(["--device", "cpu", "--steps", "2"])


def test_a_run_that_goes_on_at_the_end_is_ended(tmp_path: Path) -> None:
    class Sleepers(SmallGpu):
        def _dsdpo(self, side: Side) -> Run:
            code, log, _ = self._start(side, [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
            return Run(side, failed=f"{code}: {log[-1][1]}")

    gpu = Sleepers(CASE, tmp_path, np.array([[1, 1, 1]]), 3600, False, until=time.monotonic() + 1)
    failed = gpu.run("dsdpo").failed
    assert failed and failed.startswith("-9: TimeoutError: took longer than 1 s")


def test_dsdpo_runs_at_its_defaults(tmp_path: Path) -> None:
    assert "gradient_checkpointing" not in run_config(CASE, tmp_path)
    assert run_config(replace(CASE, gradient_checkpointing=True), tmp_path)["gradient_checkpointing"] == "full"
