"""Learning rates are transformers' own, as functions of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.train.schedule import Schedule

CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("constant_with_warmup", {}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"power": 2, "lr_end": 1e-6}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 8, "warmup_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "num_stable_steps": 6}),
]


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(("kind", "kwargs"), CASES, ids=str)
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_are_those_of_transformers(kind: str, kwargs: dict[str, Any], warmup: int) -> None:
    total, peak = 20, 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(kind, optimizer, warmup, total, kwargs)
    wanted = []
    for _ in range(total):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    schedule = Schedule(total, warmup, peak, kind, kwargs)
    assert [schedule.learning_rate(step) for step in range(total)] == wanted
    resumed = Schedule(total, warmup, peak, kind, kwargs)  # no rate depends on those that were asked for before
    assert [resumed.learning_rate(step) for step in reversed(range(total))] == wanted[::-1]


def test_constant_keeps_its_warm_up() -> None:
    rates = [Schedule(10, 4, 1.0, "constant").learning_rate(step) for step in range(10)]
    assert rates == [0.0, 0.25, 0.5, 0.75] + 6 * [1.0]


def run(**options: Any) -> RunConfig:
    return RunConfig(model_name_or_path="m", dataset="d", output_dir="o", **options)


def test_the_rates_of_earlier_versions_are_kept() -> None:
    """`cosine` and `constant` to the bit, so that a run of an earlier version resumes on the same course."""
    cosine = Schedule.of(run(learning_rate=0.01, warmup_steps=1, max_steps=500), 7)
    for step in range(1, 500):
        assert cosine.learning_rate(step) == 0.01 * 0.5 * (1 + math.cos(math.pi * ((step - 1) / 499)))
    linear = Schedule.of(run(learning_rate=3e-4, lr_scheduler_type="linear", warmup_ratio=0.1, num_train_epochs=2), 10)
    assert [linear.learning_rate(step) for step in (0, 1, 2, 11, 19)] == pytest.approx(
        [0.0, 1.5e-4, 3e-4, 1.5e-4, 3e-4 / 18], rel=1e-15
    )


def test_a_run_that_is_too_short_for_its_decay_is_refused() -> None:
    config = run(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 8}, warmup_steps=3)
    assert Schedule.of(config, 11).total_steps == 11
    with pytest.raises(ConfigError) as raised:
        Schedule.of(config, 10)
    assert [problem.code for problem in raised.value.problems] == ["lr-scheduler-room"]
