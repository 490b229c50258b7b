"""What an objective is: how the training loop turns a model's output for a batch into a loss and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch

from dsdpo.data.loader import Batch
from dsdpo.data.packing import MicroBatch
from dsdpo.model.packed import ModelOutput


class MicroBatchLoss(NamedTuple):
    """Of one micro-batch with E examples, for an objective with M metrics.

    Attributes:
        total: scalar with gradient; what the micro-batch adds to the sum that `Objective.denominator` divides.
        per_example: fp32 [E], without gradient; where an entry is not finite, the run ends and names the example.
        metrics: fp32 [M, E], without gradient; means over the examples of a step are reported.
    """

    total: torch.Tensor
    per_example: torch.Tensor
    metrics: torch.Tensor


Forward: TypeAlias = Callable[[MicroBatch], ModelOutput]
LossFunction: TypeAlias = Callable[[MicroBatch, ModelOutput], MicroBatchLoss]


class Objective(Protocol):
    """A stage's loss. One object serves all steps of a run, on all ranks.

    Attributes:
        head: what the model computes: `logprob` of the scored tokens, or a `value` for each completion.
        first_alone: whether the loss that `bind` gives is one of each example's first completion: it then gets
            micro-batches of these alone, as `only_completion` gives them.
        needs_reference: whether `bind` gets log-probs of the reference.
        metrics: M names; the first is `loss`, whose mean over a step's examples is the step's loss. So it holds an
            example's weight over their mean.
    """

    @property
    def head(self) -> Literal["logprob", "value"]: ...

    @property
    def first_alone(self) -> bool: ...

    @property
    def needs_reference(self) -> bool: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def denominator(self, batch: Batch) -> float:
        """What the sum of a step's totals over all ranks is divided by: the sum of the examples' weights, or that of
        their loss tokens times weights.

        It follows from the lengths alone, so every rank knows it. A step where it is 0 updates nothing.
        """
        ...

    def bind(self, batch: Batch, reference: torch.Tensor | None, forward: Forward) -> LossFunction:
        """The loss of each micro-batch of a step.

        Args:
            batch: the step.
            reference: fp32 [N, 2], sums of log-probs of the batch's completions as `completion_sums` gives them; those
                of this rank's micro-batches are there, others may be 0. None without a reference.
            forward: the policy; for a first pass over the batch, on all ranks alike.
        """
        ...
