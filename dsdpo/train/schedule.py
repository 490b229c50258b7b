"""How long a run is and the learning rate of each of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import get_scheduler

from dsdpo.config.schedule_rules import too_short, warmup_steps
from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError, Problem


@dataclass(frozen=True)
class Schedule:
    """Number of steps and the learning rate of each: pure functions of the step.

    `kind` and `kwargs` are `lr_scheduler_type` and `lr_scheduler_kwargs`.
    """

    total_steps: int
    warmup_steps: int
    peak: float
    kind: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> Schedule:
        """The schedule of a run over a set with so many steps per epoch.

        Raises:
            ConfigError: the run is too short for its schedule, which `max_steps` has not told before.
        """
        total = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)
        if problem := too_short(config, total):
            raise ConfigError([Problem("lr-scheduler-room", "lr_scheduler_kwargs", problem)])
        warmup, kwargs = warmup_steps(config, total), config.lr_scheduler_kwargs or {}
        return cls(total, warmup, config.learning_rate, config.lr_scheduler_type, kwargs)

    def learning_rate(self, step: int) -> float:
        """Of a 0-based step."""
        return self.peak * self._factor(step)

    @cached_property
    def _factor(self) -> Callable[[int], float]:
        """transformers' own function from the step to a factor on the peak. It makes one for an optimizer, of which it
        reads the peak alone. Its `constant` has no warm-up, where ours has one."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.peak)
        name = "constant_with_warmup" if self.kind == "constant" else self.kind
        total = self.total_steps if self.kwargs.get("num_stable_steps") is None else None  # it takes one of the two
        factor: Callable[[int], float] = get_scheduler(
            name, optimizer, self.warmup_steps, total, dict(self.kwargs)
        ).lr_lambdas[0]
        return factor
