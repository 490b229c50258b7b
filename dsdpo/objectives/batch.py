"""The losses of pairs over the micro-batches of one optimizer step, also where a loss compares pairs that lie in
different ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from deepspeed import comm

from dsdpo.data.loader import Batch
from dsdpo.data.packing import MicroBatch
from dsdpo.model.packed import ModelOutput
from dsdpo.objectives.base import Forward, MicroBatchLoss
from dsdpo.objectives.pair_logps import PairFacts
from dsdpo.objectives.sums import completion_sums


class PairLosses(NamedTuple):
    """Loss of each pair, fp32 [P] with gradient, and metrics of each, fp32 [M, P] without, the loss first."""

    losses: torch.Tensor
    metrics: torch.Tensor


# (sums fp32 [2P, 2 or 3] of the policy, fp32 [2P, 2] of the reference or None, facts) -> losses of P pairs
LossOfPairs: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None, PairFacts], PairLosses]


@dataclass(frozen=True)
class EachPair:
    """For losses that see one pair at a time.

    Attributes:
        reference: fp32 [N, 2], or None: see `Objective.bind`.
    """

    losses_of: LossOfPairs
    batch: Batch
    reference: torch.Tensor | None

    def __call__(self, micro_batch: MicroBatch, output: ModelOutput) -> MicroBatchLoss:
        """The loss of a micro-batch."""
        sums = completion_sums(output, micro_batch.completions)
        reference = None
        if self.reference is not None:
            at = torch.from_numpy(self.batch.completion_indices(micro_batch))
            reference = self.reference[at.to(sums.device, non_blocking=True)]
        examples = micro_batch.examples
        losses, metrics = self.losses_of(sums, reference, PairFacts.of(self.batch, examples, sums.device))
        weights = torch.from_numpy(self.batch.weights[examples].astype(np.float32)).to(sums.device, non_blocking=True)
        losses = losses * weights
        reported = torch.cat([losses.detach()[None] / self.batch.mean_over.mean_weight, metrics[1:]])
        return MicroBatchLoss(losses.sum(), losses.detach(), reported)


@dataclass(frozen=True)
class AcrossBatch:
    """For losses across pairs: what a pass without gradients has found out about the whole step.

    Attributes:
        gradients: fp32 [N, 2 or 3], of the sum of losses by the policy's sums.
        losses: fp32 [B].
        metrics: fp32 [M, B].
    """

    batch: Batch
    gradients: torch.Tensor
    losses: torch.Tensor
    metrics: torch.Tensor

    @classmethod
    def first_pass(
        cls, losses_of: LossOfPairs, batch: Batch, reference: torch.Tensor | None, forward: Forward
    ) -> AcrossBatch:
        """Run the policy over this rank's micro-batches, gather the step's sums on all ranks, differentiate there."""
        n = len(batch.lengths.completions)
        sums: torch.Tensor | None = None
        gathered: torch.Tensor | None = None
        for micro_batch in batch.micro_batches:
            with torch.no_grad():
                found = completion_sums(forward(micro_batch), micro_batch.completions)
            if sums is None:
                sums = torch.zeros(n, found.shape[1], device=found.device)
                gathered = torch.zeros(n, 2, device=found.device)
            at = torch.from_numpy(batch.completion_indices(micro_batch)).to(found.device, non_blocking=True)
            sums[at] = found
            if reference is not None:
                gathered[at] = reference[at]  # type: ignore[index]
        assert sums is not None, "a batch has at least one micro-batch"
        comm.all_reduce(sums)
        comm.all_reduce(gathered)
        facts = PairFacts.of(batch, np.arange(len(batch.lengths)), sums.device)
        with torch.enable_grad():
            sums.requires_grad_()
            losses, metrics = losses_of(sums, None if reference is None else gathered, facts)
            (gradients,) = torch.autograd.grad(losses.sum(), sums)
        return cls(batch, gradients, losses.detach(), metrics)

    def __call__(self, micro_batch: MicroBatch, output: ModelOutput) -> MicroBatchLoss:
        """The second pass: a number whose gradient by the policy's sums is the known one."""
        sums = completion_sums(output, micro_batch.completions)
        at = torch.from_numpy(self.batch.completion_indices(micro_batch)).to(sums.device, non_blocking=True)
        examples = torch.from_numpy(micro_batch.examples).to(sums.device, non_blocking=True)
        total = (sums * self.gradients[at]).sum()
        return MicroBatchLoss(total, self.losses[examples], self.metrics[:, examples])
