"""The functions of the losses by name. Each stands beside a row of `dsdpo.config.losses.LOSSES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from dsdpo.config.losses import LOSSES
from dsdpo.config.schema import RunConfig
from dsdpo.objectives.pair_logps import PairLogps

LossFunction: TypeAlias = Callable[[PairLogps, RunConfig], torch.Tensor]

LOSS_FUNCTIONS: dict[str, LossFunction] = {}


def loss(name: str) -> Callable[[LossFunction], LossFunction]:
    """Decorator: the function computes the loss `name`, fp32 [P] from the log-probs of P pairs.

    Raises:
        ValueError: the table of losses has no row of this name, or another function computes it.
    """
    if name not in LOSSES:
        raise ValueError(f"the loss {name} has no row in dsdpo.config.losses.LOSSES; add a LossSpec for it first")
    if name in LOSS_FUNCTIONS:
        raise ValueError(f"the loss {name} has a function already: {LOSS_FUNCTIONS[name]}; choose another name")

    def register(function: LossFunction) -> LossFunction:
        LOSS_FUNCTIONS[name] = function
        return function

    return register
