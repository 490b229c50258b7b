"""The objective of stage dpo: a weighted sum of losses over a row's pairs, and what is worth watching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsdpo.objectives.dpo import rewards, sigmoid_loss
from dsdpo.objectives.sft import sft_loss

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
    """Loss of each pair, fp32 [P] with gradient, and the sums of STATS over the pairs, [len(STATS)] without."""

    losses: torch.Tensor
    stats: torch.Tensor


@dataclass(frozen=True)
class PreferenceObjective:
    """Weighted losses over chosen and rejected log-probs.

    Args:
        weights: loss type (`sigmoid`, `sft`) -> weight.
        beta: see `rewards`.
        label_smoothing: see `sigmoid_loss`.
    """

    weights: dict[str, float]
    beta: float
    label_smoothing: float

    def __call__(self, logps: torch.Tensor, ref_logps: torch.Tensor, mean_chosen_tokens: float) -> PairLosses:
        """Losses of a row's pairs.

        Args:
            logps: fp32 [2P] from the policy, chosen and rejected in turn.
            ref_logps: fp32 [2P] from the reference, likewise.
            mean_chosen_tokens: chosen tokens per pair over the whole step; for `sft`.
        """
        chosen_logps, rejected_logps = logps.view(-1, 2).unbind(1)
        chosen_rewards, rejected_rewards = rewards(logps, ref_logps, self.beta).view(-1, 2).unbind(1)
        margins = chosen_rewards - rejected_rewards
        losses = torch.zeros_like(margins)
        if weight := self.weights.get("sigmoid"):
            losses = losses + weight * sigmoid_loss(margins, self.label_smoothing)
        if weight := self.weights.get("sft"):
            losses = losses + weight * sft_loss(chosen_logps, mean_chosen_tokens)
        columns = [
            losses,
            chosen_rewards,
            rejected_rewards,
            (margins > 0).float(),
            margins,
            chosen_logps,
            rejected_logps,
        ]
        return PairLosses(losses, torch.stack(columns).detach().sum(dim=1))
