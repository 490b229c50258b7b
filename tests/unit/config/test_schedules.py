"""Schedules of transformers by name, with their settings: the table is transformers', and faults come first."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from dsdpo.config.load import load
from dsdpo.config.rules import check_rules
from dsdpo.config.schedules import FOLLOWS_A_METRIC, SCHEDULES

OF_TRANSFORMERS = {str(name.value): function for name, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
RUN = {"model_name_or_path": "gpt2", "dataset": "pairs", "output_dir": "out"}


def found(tmp_path: Path, options: dict[str, Any], *overrides: str) -> tuple[list[tuple[str, str]], Any]:
    """(code, option) of each problem, and the run's lr_scheduler_kwargs."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | options))
    loaded = load(path, overrides)
    assert loaded.config is not None
    problems = [*loaded.problems, *check_rules(loaded, here=False)]
    return [(problem.code, problem.option) for problem in problems], loaded.config.lr_scheduler_kwargs


def test_the_table_has_every_schedule_of_transformers_that_is_a_function_of_the_step() -> None:
    assert OF_TRANSFORMERS.keys() - {*FOLLOWS_A_METRIC} == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_settings_are_those_of_transformers(name: str) -> None:
    parameters = inspect.signature(OF_TRANSFORMERS[name]).parameters
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    own = {key: one for key, one in parameters.items() if key not in given}
    spec = SCHEDULES[name]
    assert own.keys() == spec.arguments.keys()
    assert [key for key, one in own.items() if one.default is inspect.Parameter.empty] == list(spec.required)
    for key, one in own.items():
        if one.default not in (None, inspect.Parameter.empty):
            assert spec.arguments[key].takes(one.default), f"the default of {key}"


@pytest.mark.parametrize("name", FOLLOWS_A_METRIC)
def test_a_schedule_that_follows_a_metric_is_refused(name: str, tmp_path: Path) -> None:
    assert found(tmp_path, {"lr_scheduler_type": name})[0] == [("value", "lr_scheduler_type")]


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("linear", {"num_cycles": 1}, "lr-scheduler-kwargs"),
        ("constant", {"num_cycles": 1}, "lr-scheduler-kwargs"),
        ("cosine", {"num_cycle": 1}, "lr-scheduler-kwargs"),
        ("cosine", {"num_cycles": "many"}, "lr-scheduler-kwargs"),
        ("cosine", {"num_cycles": True}, "lr-scheduler-kwargs"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "lr-scheduler-kwargs"),
        ("cosine_with_min_lr", None, "lr-scheduler-kwargs"),
        ("cosine_with_min_lr", {"min_lr": 1e-7, "min_lr_rate": 0.1}, "lr-scheduler-kwargs"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.1}, "lr-scheduler-kwargs"),
        ("cosine_with_min_lr", {"min_lr": 2e-5}, "lr-scheduler-end"),
        ("polynomial", {"lr_end": 1e-4}, "lr-scheduler-end"),
        ("inverse_sqrt", {"timescale": 0}, "lr-scheduler-kwargs"),
        ("warmup_stable_decay", None, "lr-scheduler-kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "sqrt"}, "lr-scheduler-kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": 18}, "lr-scheduler-room"),
    ],
)
def test_a_wrong_setting_is_told_before_the_launch(
    name: str, kwargs: dict[str, Any] | None, problem: str, tmp_path: Path
) -> None:
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "max_steps": 20, "warmup_steps": 3}
    assert found(tmp_path, options)[0] == [(problem, "lr_scheduler_kwargs")]


def test_text_of_json_and_numbers_in_quotes_are_read(tmp_path: Path) -> None:
    least = {"lr_scheduler_type": "cosine_with_min_lr"}
    for written in ('{"min_lr": "1e-6"}', {"min_lr": "1e-6"}, {"min_lr": 1e-6}):
        assert found(tmp_path, least | {"lr_scheduler_kwargs": written}) == ([], {"min_lr": 1e-6})
    typed = found(tmp_path, least, "--lr_scheduler_kwargs", "{min_lr: 1e-6}")
    assert typed == ([], {"min_lr": 1e-6})
    assert found(tmp_path, {"lr_scheduler_kwargs": {}}) == ([], None)
    assert found(tmp_path, {"lr_scheduler_kwargs": "half"})[0] == [("value", "lr_scheduler_kwargs")]


def test_files_of_other_trainers_bring_their_settings(tmp_path: Path) -> None:
    of_trl = {"use_peft": True, "stage": "dpo", "train_batch_size": 8}
    kwargs = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert found(tmp_path, of_trl | kwargs) == ([], {"min_lr_rate": 0.1})
    assert found(tmp_path, of_trl | {"lr_scheduler_type": "inverse_sqrt"}) == ([], None)
