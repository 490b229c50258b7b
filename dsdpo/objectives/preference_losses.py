"""The losses of preference optimization. Each is a pure function, `PairLogps` -> fp32 [P].

Notation: y_w chosen, y_l rejected, h_w = log pi(y_w|x) - log pi_ref(y_w|x) and h_l likewise (the log-ratios), s the
logistic function, beta and e (label smoothing) options of the run config `o`. Delta = f'(exp h_w) - f'(exp h_l) is
h_w - h_l for the reverse KL divergence. m_w = log pi(y_w|x) / |y_w| and m_l are log-probs per
token. The losses with a reference are those of TRL under the same names, except that `sigmoid` honours label smoothing
(TRL leaves it out there).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dsdpo.config.schema import RunConfig
from dsdpo.objectives.pair_logps import PairLogps
from dsdpo.objectives.registry import loss

_LARGEST_EXPONENT = 80.0  # exp of it fits fp32, with room for products


def divergence_scores(logratios: torch.Tensor, kind: str, alpha: float) -> torch.Tensor:
    """f'(u) at u = pi / pi_ref, up to a constant, for the f-divergence that holds the policy near the reference.

    reverse_kl log u; forward_kl 1 - 1/u; js_divergence log(2u / (1 + u)); alpha_divergence (u^(alpha-1) - 1) /
    (alpha - 1), which is log u at alpha 1. Wang et al., "Beyond reverse KL: generalizing direct preference optimization
    with diverse divergence constraints" (arXiv 2309.16240), with TRL's alpha.

    Args:
        logratios: log u, any shape.
        kind: one of these names.
        alpha: of the alpha divergence.
    """
    if kind == "forward_kl":
        return 1 - torch.exp(-logratios)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if kind == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * logratios).clamp(max=_LARGEST_EXPONENT)) / (alpha - 1)
    return logratios


def _scores(p: PairLogps, o: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    kind, alpha = o.f_divergence_type, o.f_alpha_divergence_coef
    return (
        divergence_scores(p.chosen_logratios, kind, alpha),
        divergence_scores(p.rejected_logratios, kind, alpha),
    )


def _delta(p: PairLogps, o: RunConfig) -> torch.Tensor:
    chosen, rejected = _scores(p, o)
    return chosen - rejected


def _delta_per_token(p: PairLogps, o: RunConfig) -> torch.Tensor:
    chosen, rejected = _scores(p, o)
    return chosen / p.facts.tokens[:, 0] - rejected / p.facts.tokens[:, 1]


def smoothed_logistic(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1-e) log s(logits) - e log s(-logits): cross entropy to a label that is wrong with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


@loss("sigmoid")
def sigmoid(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """-log s(beta Delta): equation 7 of Rafailov et al., "Direct preference optimization" (arXiv 2305.18290).

    With label smoothing it is conservative DPO, -(1-e) log s(beta Delta) - e log s(-beta Delta): equation 3 of
    Mitchell, "A note on DPO with noisy preferences" (2023, an unpublished note).
    """
    return smoothed_logistic(o.beta * _delta(p, o), o.label_smoothing)


@loss("hinge")
def hinge(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """max(0, 1 - beta Delta): the normalized hinge loss of Liu et al., "Statistical rejection sampling improves
    preference optimization" (arXiv 2309.06657), after SLiC (arXiv 2305.10425).
    """
    return torch.relu(1 - o.beta * _delta(p, o))


@loss("ipo")
def ipo(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """(h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2: equation 17 of Azar et al., "A general theoretical paradigm to
    understand learning from human preferences" (arXiv 2310.12036), with beta for tau, and log-ratios per token.
    """
    return (_delta_per_token(p, o) - 1 / (2 * o.beta)) ** 2


@loss("exo_pair")
def exo_pair(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """KL from softmax(beta h) over the pair to the labels (1-e, e): equation 16 of Ji et al., "Towards efficient exact
    optimization of language model alignment" (arXiv 2402.00856). e must be above 0.
    """
    logits, e = o.beta * _delta(p, o), o.label_smoothing
    win, lose = F.logsigmoid(logits), F.logsigmoid(-logits)
    return win.exp() * (win - math.log1p(-e)) + lose.exp() * (lose - math.log(e))


@loss("nca_pair")
def nca_pair(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """-log s(beta h_w) - 1/2 log s(-beta h_w) - 1/2 log s(-beta h_l): two responses in Chen et al., "Noise contrastive
    alignment of language models with explicit rewards" (arXiv 2402.05369).
    """
    chosen, rejected = o.beta * p.chosen_logratios, o.beta * p.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@loss("robust")
def robust(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """(-(1-e) log s(beta Delta) + e log s(-beta Delta)) / (1 - 2e), unbiased under labels flipped with probability e:
    Chowdhury et al., "Provably robust DPO: aligning language models with noisy feedback" (arXiv 2403.00409).
    """
    logits, e = o.beta * _delta(p, o), o.label_smoothing
    return (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)


@loss("bco_pair")
def bco_pair(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """-log s(beta h_w) - log s(-beta h_l): Jung et al., "Binary classifier optimization for large language model
    alignment" (arXiv 2404.04656), without its running reward shift, as TRL computes it.
    """
    return -F.logsigmoid(o.beta * p.chosen_logratios) - F.logsigmoid(-o.beta * p.rejected_logratios)


@loss("sppo_hard")
def sppo_hard(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """(h_w - 1/(2 beta))^2 + (h_l + 1/(2 beta))^2: equation 4.7 of Wu et al., "Self-play preference optimization for
    language model alignment" (arXiv 2405.00675), with preference probabilities 1 and 0.
    """
    target = 0.5 / o.beta
    return (p.chosen_logratios - target) ** 2 + (p.rejected_logratios + target) ** 2


@loss("aot")
def aot(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """Logistic loss of beta times sorted (log pi(y_w) - log pi(y_l)) minus sorted (the same under the reference).

    Stochastic dominance between whole distributions of pairs, so the vectors must hold all pairs of the step; entry i
    is the loss at the i-th quantile. The paired form of Melnyk et al., "Distributional preference alignment of LLMs
    via optimal transport" (arXiv 2406.05882).
    """
    policy, reference = p.chosen - p.rejected, p.ref_chosen - p.ref_rejected
    return smoothed_logistic(o.beta * (policy.sort().values - reference.sort().values), o.label_smoothing)


@loss("aot_unpaired")
def aot_unpaired(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """Logistic loss of beta times sorted h_w minus sorted h_l; see `aot`. Its unpaired form."""
    gaps = p.chosen_logratios.sort().values - p.rejected_logratios.sort().values
    return smoothed_logistic(o.beta * gaps, o.label_smoothing)


@loss("apo_zero")
def apo_zero(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """1 - s(beta h_w) + s(beta h_l): equation 7 of D'Oosterlinck et al., "Anchored preference optimization and
    contrastive revisions" (arXiv 2408.06266). For chosen answers that are better than the model's own.
    """
    return 1 - torch.sigmoid(o.beta * p.chosen_logratios) + torch.sigmoid(o.beta * p.rejected_logratios)


@loss("apo_down")
def apo_down(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """s(beta h_w) + 1 - s(beta (h_w - h_l)): equation 8 of D'Oosterlinck et al. (2024). For chosen answers that are
    worse than the model's own.
    """
    gap = p.chosen_logratios - p.rejected_logratios
    return torch.sigmoid(o.beta * p.chosen_logratios) + 1 - torch.sigmoid(o.beta * gap)


@loss("discopop")
def discopop(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """(1 - m) (-log s(d)) + m exp(-d), d = beta Delta, m = s(d / tau): equation 5 of Lu et al., "Discovering preference
    optimization algorithms with and for large language models" (arXiv 2406.08414).
    """
    logits = o.beta * _delta(p, o)
    mixing = torch.sigmoid(logits / o.discopop_tau)
    return -F.logsigmoid(logits) * (1 - mixing) + torch.exp(-logits) * mixing


@loss("sigmoid_norm")
def sigmoid_norm(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """-log s(beta (h_w / |y_w| - h_l / |y_l|)): length-normalized DPO, as in Lambert et al., "Tulu 3" (arXiv
    2411.15124).
    """
    return -F.logsigmoid(o.beta * _delta_per_token(p, o))


@loss("odpo")
def odpo(p: PairLogps, o: RunConfig) -> torch.Tensor:
    """-log s(beta Delta - alpha log(score_w - score_l)): Amini et al., "Direct preference optimization with an
    offset" (arXiv 2402.10571). The scores are the data's own, chosen above rejected.
    """
    offset = o.odpo_alpha * torch.log(p.facts.score_gaps)
    return smoothed_logistic(o.beta * _delta(p, o) - offset, o.label_smoothing)


# --- without a reference ---


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
