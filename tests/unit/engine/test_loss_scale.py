"""The loss scale of fp16, apart from DeepSpeed: when it changes, and whether a step is computed again."""

from __future__ import annotations

from typing import Any

import pytest

from dsdpo.config.precision import ScaleRule
from dsdpo.engine.loss_scale import LossScale, Outcome

RULE = ScaleRule(first=16.0, lowest=1.0, window=3)
CONSTANT = ScaleRule(first=8.0, lowest=8.0, window=None)


def test_an_overflow_halves_the_scale_and_asks_for_the_same_batch() -> None:
    found = LossScale.first(RULE)
    assert found.after(overflow=True) is Outcome.AGAIN and (found.scale, found.steps) == (8.0, 0)
    assert found.after(overflow=True) is Outcome.AGAIN and found.scale == 4.0
    assert found.after(overflow=False) is Outcome.APPLIED and (found.scale, found.steps) == (4.0, 1)


def test_a_shorter_window_on_resume_doubles_at_once() -> None:
    found = LossScale.saved(RULE, {"scale": 4.0, "steps": 700})
    found.after(overflow=False)
    assert (found.scale, found.steps) == (8.0, 0)


def test_it_doubles_after_a_window_without_an_overflow() -> None:
    found = LossScale.first(RULE)
    scales = []
    for overflow in (False, False, True, False, False, False, False, False, False):
        found.after(overflow)
        scales.append(found.scale)
    assert scales == [16.0, 16.0, 8.0, 8.0, 8.0, 16.0, 16.0, 16.0, 32.0]


def test_nothing_helps_at_the_lowest_scale() -> None:
    found = LossScale(ScaleRule(first=5.0, lowest=2.0, window=3), 5.0)
    assert [found.after(overflow=True) for _ in range(3)] == [Outcome.AGAIN, Outcome.AGAIN, Outcome.FAILED]
    assert found.scale == 2.0


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_no_scale_helps_a_loss_that_is_not_finite(scale: float) -> None:
    found = LossScale(RULE, scale, 2)
    assert found.after(overflow=True, losses_finite=False) is Outcome.FAILED
    assert (found.scale, found.steps) == (scale, 2)


def test_a_constant_scale_stays() -> None:
    found = LossScale.first(CONSTANT)
    assert [found.after(overflow=False) for _ in range(2000)] == [Outcome.APPLIED] * 2000
    assert found.after(overflow=True) is Outcome.FAILED and found.scale == 8.0


def test_it_goes_on_as_it_was_saved() -> None:
    found = LossScale.first(RULE)
    for overflow in (True, False, False):
        found.after(overflow)
    again = LossScale.saved(RULE, found.state)
    assert again == found
    again.after(overflow=False)
    assert again.scale == 16.0


@pytest.mark.parametrize(
    ("rule", "scale"),
    [(ScaleRule(64.0, 32.0, 3), 32.0), (ScaleRule(64.0, 1.0, 3), 4.0), (CONSTANT, 8.0)],
)
def test_it_goes_on_under_another_rule(rule: ScaleRule, scale: float) -> None:
    """A lowest scale above the saved one, another first one, a constant one."""
    assert LossScale.saved(rule, {"scale": 4.0, "steps": 1}).scale == scale


@pytest.mark.parametrize(
    ("block", "rule"),
    [
        (None, ScaleRule(2.0**16, 1.0, 1000)),
        ({"enabled": "auto", "loss_scale": 0, "hysteresis": 2}, ScaleRule(2.0**16, 1.0, 1000)),
        ({"loss_scale": "auto", "initial_scale_power": "auto"}, ScaleRule(2.0**16, 1.0, 1000)),
        ({"initial_scale_power": 10, "loss_scale_window": 7, "min_loss_scale": 4}, ScaleRule(1024.0, 4.0, 7)),
        ({"loss_scale": 128, "min_loss_scale": 4}, ScaleRule(128.0, 128.0, None)),
        ("auto", ScaleRule(2.0**16, 1.0, 1000)),
    ],
)
def test_the_rule_is_that_of_the_json(block: Any, rule: ScaleRule) -> None:
    assert ScaleRule.of({} if block is None else {"fp16": block}) == rule


def test_the_defaults_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    theirs = DeepSpeedFP16Config(enabled=True)
    rule = ScaleRule(2.0**theirs.initial_scale_power, theirs.min_loss_scale, theirs.loss_scale_window)
    assert ScaleRule.of({}) == rule
