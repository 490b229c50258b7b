"""The objective of stage dpo: a weighted sum of losses over pairs, and what is worth watching."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsdpo.config.losses import LOSSES
from dsdpo.config.schema import RunConfig
from dsdpo.objectives import preference_losses  # noqa: F401  the losses register themselves
from dsdpo.objectives.pair_logps import PairFacts, PairLogps
from dsdpo.objectives.registry import LOSS_FUNCTIONS

STATS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class PairLosses(NamedTuple):
    """Loss of each pair, fp32 [P] with gradient, and STATS of each, fp32 [len(STATS), P] without."""

    losses: torch.Tensor
    stats: torch.Tensor


class PreferenceObjective:
    """Weighted losses of pairs, as a run config asks for them.

    Attributes:
        weights: loss type -> weight.
        spans_batch: whether a loss compares pairs with each other, so that it needs all pairs of a step at once.
    """

    def __init__(self, config: RunConfig) -> None:
        self.weights = config.weighted_losses
        self.spans_batch = any(LOSSES[name].spans_batch for name in self.weights)
        self._per_token = any(LOSSES[name].per_token for name in self.weights)
        self._config = config

    def __call__(self, outputs: torch.Tensor, reference: torch.Tensor | None, facts: PairFacts) -> PairLosses:
        """Losses of pairs: of a row, or of a whole step.

        Args:
            outputs: fp32 [2P, 2 or 3] from `PackedModel`, chosen and rejected in turn.
            reference: fp32 [2P, 2] from the reference, likewise; None without one.
            facts: of the same pairs.
        """
        pairs = PairLogps.of(outputs, reference, facts, self._config)
        losses = torch.zeros_like(pairs.weights)
        for name, weight in self.weights.items():
            losses = losses + weight * LOSS_FUNCTIONS[name](pairs, self._config)
        losses = losses * pairs.weights
        per_token = reference is None and self._per_token
        return PairLosses(losses, self._stats(pairs, losses, per_token))

    def _stats(self, pairs: PairLogps, losses: torch.Tensor, per_token: bool) -> torch.Tensor:
        """STATS of each pair.

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
