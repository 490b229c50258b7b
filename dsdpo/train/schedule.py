"""How long a run is and the learning rate of each of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsdpo.config.schema import RunConfig


@dataclass(frozen=True)
class Schedule:
    """Number of steps and the learning rate of each: pure functions of the step."""

    total_steps: int
    warmup_steps: int
    peak: float
    kind: str

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> Schedule:
        """The schedule of a run over a set with so many steps per epoch."""
        total = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)
        warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
        return cls(total, warmup, config.learning_rate, config.lr_scheduler_type)

    def learning_rate(self, step: int) -> float:
        """Of 0-based step: linear from 0 over the warm-up, then as `lr_scheduler_type` says, as in transformers."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1 - progress)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak
