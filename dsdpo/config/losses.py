"""The losses by name, and what the rest of the package must know of each without computing it.

A loss is one row of `LOSSES` and one function in `dsdpo.objectives`. The schema, the rules, the check of the data, the
objective, docs/losses.md and the tests read the row. No torch here: reading a config must cost nothing.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LossSpec:
    """What a loss needs and reads.

    Attributes:
        formula: the loss of one pair, in Markdown, in the notation of docs/losses.md.
        paper: arXiv number of its paper; empty: none.
        reference: whether it reads the reference's log-probs.
        spans_batch: whether it compares the step's pairs with each other, so that it needs all of them at once.
        per_token: whether it takes log-probs as means per token: `ld_alpha`, which weighs sums, is then refused, and
            the rewards that are logged are per token.
        divergence: whether `f_divergence_type` may be set beside it.
        options: options that it reads and some other loss does not, so without `beta`.
        needs_smoothing: whether `label_smoothing` must be above 0.
        needs_scores: whether every pair must have scores, the chosen one's above the rejected one's.
        preference: whether it compares chosen and rejected. False: a supervised term, to stand beside one that does.
    """

    formula: str
    paper: str = ""
    reference: bool = True
    spans_batch: bool = False
    per_token: bool = False
    divergence: bool = False
    options: tuple[str, ...] = ()
    needs_smoothing: bool = False
    needs_scores: bool = False
    preference: bool = True


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        "`-(1-e) log s(b D) - e log s(-b D)`", "2305.18290", divergence=True, options=("label_smoothing",)
    ),
    "hinge": LossSpec("`max(0, 1 - b D)`", "2309.06657", divergence=True),
    "ipo": LossSpec("`(h_w/|y_w| - h_l/|y_l| - 1/(2b))^2`", "2310.12036", divergence=True),
    "exo_pair": LossSpec(
        "`KL(softmax(b h) || (1-e, e))`",
        "2402.00856",
        divergence=True,
        options=("label_smoothing",),
        needs_smoothing=True,
    ),
    "nca_pair": LossSpec("`-log s(b h_w) - log s(-b h_w)/2 - log s(-b h_l)/2`", "2402.05369"),
    "robust": LossSpec(
        "`(-(1-e) log s(b D) + e log s(-b D)) / (1-2e)`", "2403.00409", divergence=True, options=("label_smoothing",)
    ),
    "bco_pair": LossSpec("`-log s(b h_w) - log s(-b h_l)`", "2404.04656"),
    "sppo_hard": LossSpec("`(h_w - 1/(2b))^2 + (h_l + 1/(2b))^2`", "2405.00675"),
    "aot": LossSpec(
        "logistic loss of `b` (sorted policy margins - sorted reference margins)",
        "2406.05882",
        spans_batch=True,
        options=("label_smoothing",),
    ),
    "aot_unpaired": LossSpec(
        "logistic loss of `b` (sorted `h_w` - sorted `h_l`)",
        "2406.05882",
        spans_batch=True,
        options=("label_smoothing",),
    ),
    "apo_zero": LossSpec("`1 - s(b h_w) + s(b h_l)`", "2408.06266"),
    "apo_down": LossSpec("`s(b h_w) + 1 - s(b (h_w - h_l))`", "2408.06266"),
    "discopop": LossSpec(
        "`-(1-k) log s(b D) + k exp(-b D)`, `k = s(b D / discopop_tau)`",
        "2406.08414",
        divergence=True,
        options=("discopop_tau",),
    ),
    "sigmoid_norm": LossSpec("`-log s(b (h_w/|y_w| - h_l/|y_l|))`", "2411.15124", divergence=True),
    "odpo": LossSpec(
        "logistic loss of `b D - odpo_alpha log(score_w - score_l)`",
        "2402.10571",
        divergence=True,
        options=("label_smoothing", "odpo_alpha"),
        needs_scores=True,
    ),
    "simpo": LossSpec(
        "logistic loss of `b (m_w - m_l) - simpo_gamma`",
        "2405.14734",
        reference=False,
        per_token=True,
        options=("label_smoothing", "simpo_gamma"),
    ),
    "cpo": LossSpec(
        "logistic loss of `b (log pi(y_w) - log pi(y_l))`, + `cpo_alpha` sft",
        "2401.08417",
        reference=False,
        options=("label_smoothing", "cpo_alpha"),
    ),
    "orpo": LossSpec("sft `- b log s(logit exp m_w - logit exp m_l)`", "2403.07691", reference=False, per_token=True),
    "sft": LossSpec(
        "negative log-likelihood per chosen token of the step", reference=False, divergence=True, preference=False
    ),
}

# Losses of 2 to 16 answers to a prompt, the best first; of two they are `sigmoid`. h_i is that of the i-th best answer.
RANKINGS: dict[str, LossSpec] = {
    "plackett_luce": LossSpec(
        "`-sum_i log(exp(b h_i) / (exp(b h_i) + sum_j exp(b h_j)))`, j worse than i", "2305.18290"
    ),
    "all_pairs": LossSpec("mean over all i, j of `-log s(b (h_i - h_j))`, j worse than i"),
    "best_worst": LossSpec("`-log s(b (h_i - h_j))`, i the best and j the worst; of ties, the mean over them"),
}
ANY_LOSS: Mapping[str, LossSpec] = ChainMap(LOSSES, RANKINGS)


def loss_table() -> str:
    """The table of docs/losses.md."""
    lines = ["| loss_type | per pair | paper (arXiv) | label_smoothing | f-divergence | reference |"]
    lines.append("| --- " * 6 + "|")
    for name, spec in {**LOSSES, **RANKINGS}.items():
        smoothing = "needed" if spec.needs_smoothing else "yes" if "label_smoothing" in spec.options else ""
        cells = (
            f"`{name}`",
            spec.formula.replace("|", "\\|"),
            spec.paper,
            smoothing,
            "yes" if spec.divergence else "",
            "yes" if spec.reference else "no",
        )
        lines.append("".join(f"| {cell} " if cell else "| " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(loss_table(), end="")
