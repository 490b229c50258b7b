"""The learning rate schedules of transformers that are functions of the step, and what each takes besides the warm-up.

The names are those of transformers.SchedulerType. Its other two, `reduce_lr_on_plateau` and `greedy`, follow a metric:
the rate of a step would depend on how often the run was evaluated and stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FOLLOWS_A_METRIC = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class Argument:
    """One key of `lr_scheduler_kwargs`: the kind of its value, the bounds of a number, or the words that it may be."""

    kind: type[float] | type[int] | type[str]
    lowest: float = 0.0
    highest: float = float("inf")
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What it takes, for a message."""
        if self.words:
            return f"one of {', '.join(self.words)}"
        bounds = f"at least {self.lowest:g}" + (f", at most {self.highest:g}" if self.highest < float("inf") else "")
        return f"{'a whole number' if self.kind is int else 'a number'}, {bounds}"

    def takes(self, value: Any) -> bool:
        """Whether a value is allowed."""
        if self.words:
            return value in self.words
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return False
        return self.lowest <= value <= self.highest and value != float("inf")


@dataclass(frozen=True)
class ScheduleSpec:
    """What a schedule takes.

    Attributes:
        arguments: key of `lr_scheduler_kwargs` -> what it may be.
        required: those that must be given.
        either: two of which exactly one must be given.
        deepspeed: the same schedule, without arguments, as `scheduler.type` of a DeepSpeed JSON; empty: there is none.
    """

    arguments: Mapping[str, Argument] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    deepspeed: str = ""


_NUMBER, _SHARE, _STEPS = Argument(float), Argument(float, highest=1.0), Argument(int)
_SHAPE = Argument(str, words=("linear", "cosine", "1-sqrt"))
_MIN_LR = {"num_cycles": _NUMBER, "min_lr": _NUMBER, "min_lr_rate": _SHARE}
_EITHER = ("min_lr", "min_lr_rate")

SCHEDULES: dict[str, ScheduleSpec] = {
    "cosine": ScheduleSpec({"num_cycles": _NUMBER}, deepspeed="WarmupCosineLR"),
    "linear": ScheduleSpec(deepspeed="WarmupDecayLR"),
    "constant": ScheduleSpec(deepspeed="WarmupLR"),
    "constant_with_warmup": ScheduleSpec(deepspeed="WarmupLR"),
    "cosine_with_restarts": ScheduleSpec({"num_cycles": Argument(int, lowest=1)}),
    "cosine_with_min_lr": ScheduleSpec(_MIN_LR, either=_EITHER),
    "cosine_warmup_with_min_lr": ScheduleSpec({**_MIN_LR, "warmup_lr_rate": _SHARE}, either=_EITHER),
    "polynomial": ScheduleSpec({"lr_end": _NUMBER, "power": _NUMBER}),
    "inverse_sqrt": ScheduleSpec({"timescale": Argument(int, lowest=1)}),
    "warmup_stable_decay": ScheduleSpec(
        {
            "num_decay_steps": _STEPS,
            "num_stable_steps": _STEPS,
            "warmup_type": _SHAPE,
            "decay_type": _SHAPE,
            "min_lr_ratio": _SHARE,
            "num_cycles": _NUMBER,
        },
        required=("num_decay_steps",),
    ),
}

SCHEDULE_WORDS = f"one of {', '.join(SCHEDULES)}"


def check_schedule(name: str) -> str:
    """The name, where there is such a schedule. Raises ValueError."""
    if name not in SCHEDULES:
        raise ValueError(f"must be {SCHEDULE_WORDS}")
    return name


def schedule_hint(name: str) -> str:
    """Why a schedule of transformers is not among ours."""
    return "it follows a metric and is no function of the step; " if name in FOLLOWS_A_METRIC else ""


def read_kwargs(value: object) -> object:
    """A mapping, or JSON text of one as transformers' command line takes it, with texts that are numbers as numbers:
    YAML reads 1e-6 as a text. None, where it is empty."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if not isinstance(value, dict):
        return value
    return {name: _number(found) for name, found in value.items()} or None


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        return value
