"""The objective of stages pt and sft: the negative log-likelihood of the words that are trained."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch
from dsdpo.data.packing import MicroBatch
from dsdpo.model.packed import ModelOutput
from dsdpo.objectives.base import Forward, LossFunction, MicroBatchLoss
from dsdpo.objectives.sums import completion_sums, segment_sums


class SupervisedObjective:
    """-sum(w log p) / sum(w n) over a step, of examples with weight w and n tokens in the loss.

    So each token counts alike, as in transformers' Trainer and TRL's SFTTrainer, on any number of ranks.

    Attributes:
        head, needs_reference, metrics: see `Objective`.
    """

    head: Literal["logprob"] = "logprob"
    first_alone = False
    needs_reference = False
    metrics = ("loss",)

    def __init__(self, config: RunConfig) -> None:
        pass

    def denominator(self, batch: Batch) -> float:
        """The sum of loss tokens times weights."""
        return float((batch.weights * batch.lengths.loss_tokens_of_examples).sum())

    def bind(self, batch: Batch, reference: torch.Tensor | None, forward: Forward) -> LossFunction:
        """See `Objective`."""
        over = batch.mean_over
        tokens = float((over.weights * over.lengths.loss_tokens_of_examples).sum())
        per_example = len(over.lengths) / max(tokens, 1.0)

        def loss_of(micro_batch: MicroBatch, output: ModelOutput) -> MicroBatchLoss:
            """The loss of a micro-batch."""
            sums = completion_sums(output, micro_batch.completions).sum(1)
            answers = np.diff(np.append(np.flatnonzero(micro_batch.completions[:, 1] == 0), len(sums)))
            weights = torch.from_numpy(batch.weights[micro_batch.examples].astype(np.float32))
            losses = -segment_sums(sums, answers) * weights.to(sums.device, non_blocking=True)
            return MicroBatchLoss(losses.sum(), losses.detach(), (losses.detach() * per_example)[None])

        return loss_of
