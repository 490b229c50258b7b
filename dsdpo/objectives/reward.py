"""The objective of stage rm: a reward for each answer, the chosen one's above the rejected one's."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch
from dsdpo.data.packing import MicroBatch
from dsdpo.errors import DataError
from dsdpo.model.packed import ModelOutput
from dsdpo.objectives.base import Forward, LossFunction, MicroBatchLoss


class RewardObjective:
    """Bradley-Terry over pairs: -log sigmoid(r_w - r_l - m), plus c (r_w + r_l)^2.

    The loss is that of Ouyang et al., "Training language models to follow instructions with human feedback" (arXiv
    2203.02155), the margin m that of Llama 2 (arXiv 2307.09288, equation 2), the second term that of Eisenstein et
    al., "Helping or herding?" (arXiv 2312.09244); both as in TRL's RewardTrainer.

    Attributes:
        head, needs_reference, metrics: see `Objective`.
    """

    head: Literal["value"] = "value"
    first_alone = False
    needs_reference = False
    metrics = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

    def __init__(self, config: RunConfig) -> None:
        self._has_margin = config.margin_from_scores
        self._centering = config.center_rewards_coefficient

    def denominator(self, batch: Batch) -> float:
        """The sum of the pairs' weights."""
        return float(batch.weights.sum())

    def bind(self, batch: Batch, reference: torch.Tensor | None, forward: Forward) -> LossFunction:
        """See `Objective`.

        Raises:
            DataError: an example has not two completions, or lacks the scores that its margin is made of.
        """
        if (batch.lengths.counts != 2).any():
            where = int(batch.example_ids[batch.lengths.counts != 2][0])
            raise DataError(f"example {where} has not two completions, which stage rm compares; choose another set")
        scores = batch.scores.reshape(-1, 2)
        margins = (scores[:, 0] - scores[:, 1]) if self._has_margin else np.zeros(len(scores))
        if np.isnan(margins).any():
            where = int(batch.example_ids[np.isnan(margins)][0])
            raise DataError(f"margin_from_scores is set, and example {where} has no scores; unset it, or add them")

        def loss_of(micro_batch: MicroBatch, output: ModelOutput) -> MicroBatchLoss:
            """The loss of a micro-batch."""
            assert output.values is not None, "rewards need a value head"
            chosen, rejected = output.values.view(-1, 2).unbind(1)
            weight, margin = (
                torch.from_numpy(values[micro_batch.examples].astype(np.float32)).to(chosen.device, non_blocking=True)
                for values in (batch.weights, margins)
            )
            losses = -F.logsigmoid(chosen - rejected - margin) + self._centering * (chosen + rejected) ** 2
            losses = losses * weight
            reported = losses / batch.mean_over.mean_weight
            metrics = torch.stack([reported, chosen, rejected, (chosen > rejected).float(), chosen - rejected])
            return MicroBatchLoss(losses.sum(), losses.detach(), metrics.detach())

        return loss_of
