"""Objectives for 1, 2 and 4 completions that exist for tests alone: they prove what objectives share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from dsdpo.config.stages import STAGES, StageSpec
from dsdpo.data.loader import Batch
from dsdpo.data.packing import MicroBatch
from dsdpo.model.packed import ModelOutput
from dsdpo.objectives.base import Forward, LossFunction, MicroBatchLoss
from dsdpo.objectives.stages import OBJECTIVES
from dsdpo.objectives.sums import completion_sums
from tests.helpers.tiny import ListOfExamples, random_examples


def weights_of(batch: Batch, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """fp32 [E]."""
    return torch.from_numpy(batch.weights[micro_batch.examples].astype(np.float32)).to(device)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Of one completion, a mean over the loss tokens of a step; an example's weight scales its part of the sum."""

    head: ClassVar[Literal["logprob"]] = "logprob"
    needs_reference: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("loss", "tokens")

    def denominator(self, batch: Batch) -> float:
        """Loss tokens, each with its example's weight."""
        return float((batch.lengths.loss_tokens * batch.weights).sum())

    def bind(self, batch: Batch, reference: torch.Tensor | None, forward: Forward) -> LossFunction:
        """See `Objective`."""
        assert reference is None and (batch.lengths.counts == 1).all()
        over, weights = batch.mean_over
        # a mean over examples is then one over tokens
        examples_per_token = len(over) / (over.loss_tokens * weights).sum()

        def loss_of(micro_batch: MicroBatch, output: ModelOutput) -> MicroBatchLoss:
            logps = completion_sums(output, micro_batch.completions).sum(1)
            losses = -logps * weights_of(batch, micro_batch, logps.device)
            tokens = torch.from_numpy(micro_batch.completions[:, 2]).to(losses)
            metrics = torch.stack([losses.detach() * examples_per_token, tokens])
            return MicroBatchLoss(losses.sum(), losses.detach(), metrics)

        return loss_of


def register() -> None:
    """Make the stage `likelihood` known to this process."""
    OBJECTIVES["likelihood"] = lambda config: NegativeLogLikelihood()
    STAGES["likelihood"] = StageSpec("a stage of the tests")


def examples_for(stage: str, n: int, seed: int = 0) -> ListOfExamples:
    """Weighted examples for a stage: rankings of 2 to 4 answers for `dpo`, with ties; masks and empty prompts for
    `likelihood`."""
    masked = stage == "likelihood"
    counts = {"likelihood": (1,), "dpo": (4, 2, 3), "rm": (2,)}[stage]
    weights = np.random.default_rng(seed).choice([0.5, 1.0, 2.0], size=n)
    examples = random_examples(n, counts, seed, masks=masked, empty=masked)
    scores = np.random.default_rng(seed).normal(size=2 * n) if stage == "rm" else None
    if stage == "dpo":
        ranked = [{4: (3.0, 2.0, 2.0, 0.0), 3: (np.nan,) * 3, 2: (1.0, 1.0)}[len(e.completion_ids)] for e in examples]
        scores = np.concatenate(ranked)
    return ListOfExamples(examples, scores, weights)
