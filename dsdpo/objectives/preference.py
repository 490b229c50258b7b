"""The objective of stage dpo: a weighted sum of losses over pairs, and what is worth watching."""

from __future__ import annotations

from typing import Literal

import torch

from dsdpo.config.losses import LOSSES
from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch
from dsdpo.errors import DataError
from dsdpo.objectives import preference_losses  # noqa: F401  the losses register themselves
from dsdpo.objectives.base import Forward, LossFunction
from dsdpo.objectives.batch import AcrossBatch, EachPair, PairLosses
from dsdpo.objectives.pair_logps import PairFacts, PairLogps
from dsdpo.objectives.registry import LOSS_FUNCTIONS

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class PreferenceObjective:
    """Weighted losses of pairs, as a run config asks for them: of examples with two completions, the chosen one first.

    Attributes:
        weights: loss type -> weight.
        spans_batch: whether a loss compares pairs with each other, so that it needs all pairs of a step at once.
        head, needs_reference, metrics: see `Objective`.
    """

    head: Literal["logprob"] = "logprob"
    first_alone = False
    metrics = METRICS

    def __init__(self, config: RunConfig) -> None:
        self.weights = config.weighted_losses
        self.spans_batch = any(LOSSES[name].spans_batch for name in self.weights)
        self.needs_reference = any(LOSSES[name].reference for name in self.weights)
        self._per_token = any(LOSSES[name].per_token for name in self.weights)
        self._config = config

    def denominator(self, batch: Batch) -> float:
        """The sum of the pairs' weights."""
        return float(batch.weights.sum())

    def bind(self, batch: Batch, reference: torch.Tensor | None, forward: Forward) -> LossFunction:
        """See `Objective`. Raises DataError where an example has not two completions."""
        if (batch.lengths.counts != 2).any():
            where = int(batch.example_ids[batch.lengths.counts != 2][0])
            raise DataError(f"example {where} has not two completions, which stage dpo compares; choose another set")
        if not self.spans_batch:
            return EachPair(self.losses, batch, reference)
        if (batch.weights != 1).any():
            raise DataError(f"loss_type {', '.join(self.weights)} has no loss of one pair that a weight could scale")
        return AcrossBatch.first_pass(self.losses, batch, reference, forward)

    def losses(self, sums: torch.Tensor, reference: torch.Tensor | None, facts: PairFacts) -> PairLosses:
        """Losses of pairs: of a micro-batch, or of a whole step.

        Args:
            sums: fp32 [2P, 2 or 3] of the policy from `completion_sums`, chosen and rejected in turn.
            reference: fp32 [2P, 2] from the reference, likewise; None without one.
            facts: of the same pairs.
        """
        pairs = PairLogps.of(sums, reference, facts, self._config)
        losses = torch.zeros_like(pairs.weights)
        for name, weight in self.weights.items():
            losses = losses + weight * LOSS_FUNCTIONS[name](pairs, self._config)
        losses = losses * pairs.weights
        per_token = reference is None and self._per_token
        return PairLosses(losses, self._metrics(pairs, losses, per_token))

    def _metrics(self, pairs: PairLogps, losses: torch.Tensor, per_token: bool) -> torch.Tensor:
        """METRICS of each pair.

        The reward is beta times the log-ratio to the reference: equation 5 of Rafailov et al., "Direct preference
        optimization" (arXiv 2305.18290). Without a reference it is beta times the log-prob, per token for
        the losses that see it so.
        """
        chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        if per_token:
            chosen, rejected = pairs.mean_logps
        chosen, rejected = self._config.beta * chosen, self._config.beta * rejected
        columns = [
            losses,
            chosen,
            rejected,
            (chosen > rejected).float(),
            chosen - rejected,
            pairs.chosen,
            pairs.rejected,
        ]
        return torch.stack(columns).detach()
