"""Losses of preference optimization without a reference. Each is a pure function, `PairLogps` -> fp32 [P].

Notation as in `dpo.py`; m_w = log pi(y_w|x) / |y_w| and m_l likewise are log-probs per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsdpo.config.schema import RunConfig
from dsdpo.objectives.dpo import smoothed_logistic
from dsdpo.objectives.pairs import PairLogps
from dsdpo.objectives.registry import loss
from dsdpo.objectives.sft import sft_loss


@loss("simpo")
def simpo(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """-log s(beta m_w - beta m_l - gamma): equation 6 of Meng et al., "SimPO: simple preference optimization with a
    reference-free reward" (arXiv 2405.14734). Their beta lies around 2, gamma around half of it.
    """
    chosen, rejected = p.mean_logps
    return smoothed_logistic(o.beta * (chosen - rejected) - o.simpo_gamma, o.label_smoothing)


@loss("cpo")
def cpo(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """-log s(beta (log pi(y_w|x) - log pi(y_l|x))) + alpha NLL(y_w): Xu et al., "Contrastive preference
    optimization" (arXiv 2401.08417). NLL is `sft_loss`: per chosen token of the step, as in TRL.
    """
    preference = smoothed_logistic(o.beta * (p.chosen - p.rejected), o.label_smoothing)
    return preference + o.cpo_alpha * sft_loss(p.chosen_sum, p.facts.mean_chosen_tokens)


@loss("orpo")
def orpo(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """NLL(y_w) - beta log s(logit(exp m_w) - logit(exp m_l)): equations 6 and 7 of Hong et al., "ORPO: monolithic
    preference optimization without reference model" (arXiv 2403.07691), with beta for lambda. NLL is `sft_loss`, of the
    completion alone.
    """
    chosen, rejected = p.mean_logps
    log_odds = (chosen - _log_not(chosen)) - (rejected - _log_not(rejected))
    return sft_loss(p.chosen_sum, p.facts.mean_chosen_tokens) - o.beta * F.logsigmoid(log_odds)


def _log_not(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(logp)), exact for log-probs near 0 and far below; logp is at most 0."""
    logp = logp.clamp(max=-1e-7)  # a completion of probability 1 has infinite odds
    return torch.where(logp > -0.6931, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))
