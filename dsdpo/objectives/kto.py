"""The objective of stage kto: single answers that are labelled desirable or undesirable."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from deepspeed import comm

from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch
from dsdpo.data.packing import MicroBatch, only_completion
from dsdpo.model.packed import ModelOutput
from dsdpo.objectives.base import Forward, LossFunction, MicroBatchLoss
from dsdpo.objectives.sums import completion_sums


class KTOObjective:
    """1 - sigmoid(beta (r - z)) of a desirable answer, 1 - sigmoid(beta (z - r)) of an undesirable one, each times its
    weight: equation 7 of Ethayarajh et al., "KTO: Model alignment as prospect theoretic optimization" (arXiv
    2402.01306).

    r is log(pi(y|x) / pi_ref(y|x)). z is max(0, the mean of the same over the step's mismatched answers), without
    gradient, as in TRL's KTOTrainer, which takes a mean of the ranks' means.

    Attributes:
        head, needs_reference, metrics: see `Objective`. An example's second completion is its mismatched answer.
    """

    head: Literal["logprob"] = "logprob"
    first_alone = True
    needs_reference = True
    metrics = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl")

    def __init__(self, config: RunConfig) -> None:
        self._beta = config.beta
        self._weights = np.array([config.undesirable_weight, config.desirable_weight])

    def denominator(self, batch: Batch) -> float:
        """The sum of the examples' weights."""
        return float(batch.weights.sum())

    def bind(self, batch: Batch, reference: torch.Tensor | None, forward: Forward) -> LossFunction:
        """See `Objective`."""
        assert reference is not None, "labelled answers are compared with the reference"
        baseline = self._baseline(batch, reference, forward)
        labels = batch.scores.reshape(-1, 2)[:, 0]
        over = batch.mean_over
        desirable = over.scores.reshape(-1, 2)[:, 0]
        shares = [max(float(x), 1.0) / len(desirable) for x in ((desirable == 0).sum(), (desirable == 1).sum())]

        def loss_of(micro_batch: MicroBatch, output: ModelOutput) -> MicroBatchLoss:
            """The loss of a micro-batch."""
            ratios = _log_ratios(batch, micro_batch, output, reference, 0)
            is_good = labels[micro_batch.examples] == 1
            factors = self._weights[is_good.astype(int)] * batch.weights[micro_batch.examples]
            good, factor, weight = (
                torch.from_numpy(x.astype(np.float32)).to(ratios.device, non_blocking=True)
                for x in (is_good, factors, batch.weights[micro_batch.examples])
            )
            losses = (1 - torch.sigmoid(self._beta * (2 * good - 1) * (ratios - baseline))) * factor
            rewards = self._beta * ratios.detach()
            chosen, rejected = rewards * good / shares[1], rewards * (1 - good) / shares[0]
            reported = losses.detach() / over.mean_weight
            metrics = torch.stack([reported, chosen, rejected, chosen - rejected, baseline.expand_as(weight)])
            return MicroBatchLoss(losses.sum(), losses.detach(), metrics)

        return loss_of

    @staticmethod
    def _baseline(batch: Batch, reference: torch.Tensor, forward: Forward) -> torch.Tensor:
        """z, fp32 [] on all ranks: a pass of the policy over the step's mismatched answers. A collective call."""
        total = torch.zeros(1, dtype=torch.float64, device=reference.device)
        for micro_batch in batch.micro_batches:
            mismatched = only_completion(micro_batch, 1)
            with torch.no_grad():
                output = forward(mismatched)
            total += _log_ratios(batch, mismatched, output, reference, 1).double().sum()
        comm.all_reduce(total)
        return (total / len(batch.lengths)).clamp(min=0).float()[0]


def _log_ratios(
    batch: Batch, micro_batch: MicroBatch, output: ModelOutput, reference: torch.Tensor, number: int
) -> torch.Tensor:
    """log(pi / pi_ref) of completion `number` of the batch's examples, fp32 [E].

    Args:
        micro_batch: with that completion alone.
    """
    sums = completion_sums(output, micro_batch.completions).sum(1)
    at = torch.from_numpy(batch.lengths.starts[micro_batch.examples] + number).to(sums.device, non_blocking=True)
    return sums - reference[at].sum(1)
