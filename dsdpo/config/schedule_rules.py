"""What must hold between a schedule's name and its settings. Each rule returns a message, or an empty string."""

from __future__ import annotations

import math

from dsdpo.config.loss_rules import Given, Rule
from dsdpo.config.schedules import SCHEDULES
from dsdpo.config.schema import RunConfig


def warmup_steps(config: RunConfig, total: int) -> int:
    """Steps of the warm-up in a run of so many steps."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * total)


def too_short(config: RunConfig, total: int) -> str:
    """Why a run of so many steps has no room for its schedule; empty where it has."""
    settings = config.lr_scheduler_kwargs or {}
    if config.lr_scheduler_type != "warmup_stable_decay" or settings.get("num_stable_steps") is not None:
        return ""
    warmup, decay = warmup_steps(config, total), settings["num_decay_steps"]
    if warmup + decay <= total:
        return ""
    return (
        f"the run has {total} steps, but {warmup} of warm-up and num_decay_steps {decay} of lr_scheduler_kwargs are "
        "more; lower one of them"
    )


def _kwargs(config: RunConfig, given: Given) -> str:
    name, settings = config.lr_scheduler_type, config.lr_scheduler_kwargs or {}
    spec = SCHEDULES[name]
    known = f"it takes {', '.join(spec.arguments)}" if spec.arguments else "it takes none; delete the line"
    if unknown := [key for key in settings if key not in spec.arguments]:
        return f"lr_scheduler_kwargs has {', '.join(unknown)}, which lr_scheduler_type {name} does not take; {known}"
    for key, value in settings.items():
        if not spec.arguments[key].takes(value):
            return f"{key} of lr_scheduler_kwargs is {value!r}; allowed: {spec.arguments[key].allowed}"
    if missing := [key for key in spec.required if key not in settings]:
        return f"lr_scheduler_type {name} needs {missing[0]} in lr_scheduler_kwargs; {known}"
    if spec.either and len([key for key in spec.either if key in settings]) != 1:
        return f"lr_scheduler_type {name} needs one of {' and '.join(spec.either)} in lr_scheduler_kwargs"
    return ""


def _lowest_rate(config: RunConfig, given: Given) -> str:
    """The rate at the end is below the peak: transformers' `polynomial` demands it, the others would rise."""
    if _kwargs(config, given):
        return ""
    settings = config.lr_scheduler_kwargs or {}
    lowest = settings.get("min_lr", settings.get("lr_end", 1e-7 if config.lr_scheduler_type == "polynomial" else 0.0))
    if lowest < config.learning_rate:
        return ""
    key = "min_lr" if "min_lr" in settings else "lr_end"
    return (
        f"learning_rate is {config.learning_rate}, but {key} of lr_scheduler_kwargs is {lowest}"
        f"{'' if key in settings else ', its default'}; set it below learning_rate"
    )


def _room(config: RunConfig, given: Given) -> str:
    if config.max_steps is None or _kwargs(config, given):
        return ""
    return too_short(config, config.max_steps)


_KEYS = ("lr_scheduler_kwargs", "lr_scheduler_type")
SCHEDULE_RULES: list[Rule] = [
    ("lr-scheduler-kwargs", _KEYS, _kwargs),
    ("lr-scheduler-end", (*_KEYS, "learning_rate"), _lowest_rate),
    ("lr-scheduler-room", (*_KEYS, "max_steps", "warmup_steps", "warmup_ratio"), _room),
]
