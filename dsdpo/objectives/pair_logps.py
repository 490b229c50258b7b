"""What the losses of preference pairs see: log-probs of both completions under policy and reference, and facts.

Vectors are fp32 [P], one entry per pair. What comes from the reference or the data carries no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch


class PairFacts(NamedTuple):
    """What is known of pairs without a model.

    Attributes:
        tokens: fp32 [P, 2], scored tokens of chosen and rejected.
        score_gaps: fp32 [P], the data's score of chosen minus that of rejected; NaN where there are none.
        mean_chosen_tokens: chosen tokens per pair, averaged over the whole optimizer step with the pairs' weights.
    """

    tokens: torch.Tensor
    score_gaps: torch.Tensor
    mean_chosen_tokens: float

    @classmethod
    def of(cls, batch: Batch, examples: np.ndarray, device: torch.device) -> PairFacts:
        """Of some examples of a batch. examples: int64 [P], indices into it."""
        tokens = batch.lengths.loss_tokens.reshape(-1, 2)[examples].astype(np.float32)
        scores = batch.scores.reshape(-1, 2)[examples]
        gaps = (scores[:, 0] - scores[:, 1]).astype(np.float32)
        return cls(
            torch.from_numpy(tokens).to(device, non_blocking=True),
            torch.from_numpy(gaps).to(device, non_blocking=True),
            batch.mean_over.mean_first_loss_tokens,
        )


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of pairs, fp32 [P] each.

    Attributes:
        chosen, rejected: of the policy, summed over the completion's tokens; `ld_alpha` weighs the later ones.
        ref_chosen, ref_rejected: of the reference, likewise; 0 where there is none.
        chosen_sum: of the policy, the plain sum.
        weights: importance of each pair, without gradient; 1 unless `use_weighting`.
        facts: see there.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_sum: torch.Tensor
    weights: torch.Tensor
    facts: PairFacts

    @classmethod
    def of(cls, sums: torch.Tensor, reference: torch.Tensor | None, facts: PairFacts, config: RunConfig) -> PairLogps:
        """From sums over the completions' tokens.

        Args:
            sums: fp32 [2P, 2 or 3] of the policy, chosen and rejected in turn: see `completion_sums`.
            reference: fp32 [2P, 2], the same for the reference; None without one.
            facts: of the same pairs.
            config: of its options, `ld_alpha` and `use_weighting`.
        """
        parts = sums[:, :2]
        chosen, rejected = _weigh_tail(parts, config.ld_alpha).view(-1, 2).unbind(1)
        none = torch.zeros_like(parts.detach())
        ref = _weigh_tail(none if reference is None else reference, config.ld_alpha)
        ref_chosen, ref_rejected = ref.view(-1, 2).unbind(1)
        weights = torch.ones_like(ref_chosen)
        if config.use_weighting:
            weights = wpo_weights(sums[:, 2].detach().view(-1, 2), facts.tokens)
        return cls(chosen, rejected, ref_chosen, ref_rejected, parts.sum(1)[::2], weights, facts)

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x)."""
        return self.rejected - self.ref_rejected

    @property
    def mean_logps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of chosen and rejected per token of each."""
        chosen_tokens, rejected_tokens = self.facts.tokens.unbind(1)
        return self.chosen / chosen_tokens, self.rejected / rejected_tokens


def _weigh_tail(parts: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """Log-prob of a completion with the tokens beyond the end of the pair's other completion weighed by ld_alpha.

    log p(y up to the shorter length) + alpha log p(rest): Liu et al., "Length desensitization in direct preference
    optimization" (arXiv 2409.06411). parts: fp32 [..., 2], the two sums. Returns fp32 [...].
    """
    shared, tail = parts.unbind(-1)
    return shared + tail * (1.0 if ld_alpha is None else ld_alpha)


def wpo_weights(aligned_logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Importance of pairs that the policy itself might have produced.

    w(x, y_w) w(x, y_l) with w(x, y) = exp(1/|y| sum_t log(p_t / sum_v p_v^2)): equation 2, with sampled
    alignment, of Zhou et al., "WPO: enhancing RLHF with weighted preference optimization" (arXiv 2406.11827).

    Args:
        aligned_logps: fp32 [P, 2], the sum over t for chosen and rejected.
        tokens: fp32 [P, 2], |y|.

    Returns:
        fp32 [P].
    """
    return torch.exp(aligned_logps / tokens).prod(1)
