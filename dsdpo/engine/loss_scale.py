"""The loss scale of a run in fp16, and what follows a step whose gradients overflowed.

DeepSpeed skips such a step: the batch would be lost, and the learning rate would move on without it. Here the same
batch is computed again with half the scale. DeepSpeed also doubles a scale between the check and the division of the
gradients by it, so that one step in `loss_scale_window` would be half as long. So it is given a constant scale, which
this module sets for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from dsdpo.compat import drop_overflowed_gradients, without_scale_warnings
from dsdpo.config.precision import ScaleRule
from dsdpo.runtime.collectives import any_rank

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Outcome(Enum):
    """Of a step."""

    APPLIED = "the weights were updated"
    AGAIN = "the same batch is to be computed again, with a lower scale"
    FAILED = "no lower scale helps"


@dataclass
class LossScale:
    """The scale and what it remembers.

    Attributes:
        rule: how it changes.
        scale: of the next step.
        steps: without an overflow since the scale last changed.
    """

    rule: ScaleRule
    scale: float
    steps: int = 0

    @classmethod
    def first(cls, rule: ScaleRule) -> LossScale:
        """Of a run that begins."""
        return cls(rule, rule.first)

    @classmethod
    def saved(cls, rule: ScaleRule, state: dict[str, Any]) -> LossScale:
        """As `state` told it, under a rule that may have changed since."""
        if rule.window is None:
            return cls.first(rule)
        return cls(rule, max(float(state["scale"]), rule.lowest), int(state["steps"]))

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "steps": self.steps}

    def after(self, overflow: bool, losses_finite: bool = True) -> Outcome:
        """What follows a step, with the scale for what comes next.

        Args:
            overflow: whether a gradient was not finite, so that no weight was changed.
            losses_finite: whether all losses were. They are not scaled: where one is not finite, no lower scale helps.
        """
        if not overflow:
            self.steps += 1
            if self.rule.window is not None and self.steps >= self.rule.window:
                self.scale, self.steps = 2 * self.scale, 0
            return Outcome.APPLIED
        if self.scale <= self.rule.lowest or not losses_finite:
            return Outcome.FAILED
        self.scale, self.steps = max(self.scale / 2, self.rule.lowest), 0
        return Outcome.AGAIN


class StepScaling:
    """Sets the loss scale of each step of an engine, and tells which are to be computed again; only in fp16.

    Args:
        engine: of the policy.
        device: of the engine.
        loss_scale: where the run begins; None outside of fp16.

    Attributes:
        loss_scale: as above.
        used: scale of the last attempt at the step.
        repeats: how often the step has been computed again.
    """

    def __init__(self, engine: DeepSpeedEngine, device: torch.device, loss_scale: LossScale | None) -> None:
        self._engine = engine
        self._device = device
        self._random: list[torch.Tensor] = []
        self.loss_scale = loss_scale
        self.used = loss_scale.scale if loss_scale else 1.0
        self.repeats = 0
        if loss_scale is not None:
            without_scale_warnings(engine)

    @property
    def state(self) -> dict[str, Any]:
        """What run.json of a checkpoint says of it."""
        return {"loss_scale": self.loss_scale.state} if self.loss_scale else {}

    @property
    def record(self) -> dict[str, float]:
        """What metrics.jsonl says of the last step."""
        return {"loss_scale": self.used, "computed_again": float(self.repeats)} if self.loss_scale else {}

    def begin_step(self) -> None:
        """Before the forward passes of a step: dropout draws the same numbers each time that it is computed."""
        self.repeats = 0
        if self.loss_scale is None:
            return
        self._random = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))
        self._set(self.loss_scale.scale)

    def computes_again(self, losses: Sequence[torch.Tensor]) -> bool:
        """After `engine.step()` at the end of a step: whether the same step is to be computed again. A collective call
        where gradients overflowed.

        Args:
            losses: of this rank's examples.
        """
        if self.loss_scale is None:
            return False
        overflow = bool(self._engine.optimizer.overflow)  # the same on all ranks
        finite = not overflow or not any_rank(not all(bool(x.isfinite().all()) for x in losses), self._device)
        if self.loss_scale.after(overflow, finite) is not Outcome.AGAIN:
            return False
        self.repeats += 1
        self._engine.global_steps -= 1  # DeepSpeed counts the skipped one
        drop_overflowed_gradients(self._engine)
        torch.set_rng_state(self._random[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._random[1], self._device)
        self._set(self.loss_scale.scale)
        return True

    def _set(self, scale: float) -> None:
        self.used = scale
        self._engine.optimizer.loss_scale = scale
