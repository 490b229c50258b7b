"""Supervised term: the chosen completion's negative log-likelihood."""

from __future__ import annotations

import torch

from dsdpo.config.schema import RunConfig
from dsdpo.objectives.pairs import PairLogps
from dsdpo.objectives.registry import loss


def sft_loss(chosen_logps: torch.Tensor, mean_tokens: float) -> torch.Tensor:
    """Per-pair terms whose mean over a step is the mean negative log-likelihood per chosen token.

    The mean over the P pairs of (-logp_i / (N/P)), N chosen tokens in all, is -sum(logp_i) / N: every token of
    the step weighs the same, as in TRL's `sft` loss, however the pairs are spread over ranks and rows.

    Args:
        chosen_logps: fp32 [P], summed over tokens.
        mean_tokens: chosen tokens per pair, averaged over the whole step.

    Returns:
        fp32 [P].
    """
    return -chosen_logps / mean_tokens


@loss("sft")
def sft(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """`sft_loss` of the chosen completions."""
    return sft_loss(p.chosen_sum, p.facts.mean_chosen_tokens)
