"""The training stages by name. A stage is a row here and an objective in `dsdpo.objectives.stages`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Records: TypeAlias = Literal["pairs", "replies", "labelled", "texts"]


@dataclass(frozen=True)
class StageSpec:
    """What a stage trains, and what the checks before a run must know of it.

    Attributes:
        text: for `--help`.
        records: what its records are: `pairs` of answers (or rankings), `replies` to train, answers that are
            `labelled` good or bad, or `texts`.
        head: what the model computes, as in `dsdpo.objectives.base.Objective`.
        options: options that it reads and some other stage does not.
    """

    text: str
    records: Records = "pairs"
    head: Literal["logprob", "value"] = "logprob"
    options: tuple[str, ...] = ()


STAGES: dict[str, StageSpec] = {
    "pt": StageSpec("further pre-training on plain text", records="texts"),
    "sft": StageSpec(
        "supervised training on the assistant's words",
        records="replies",
        options=("mask_history", "mask_thinking", "neftune_noise_alpha"),
    ),
    "dpo": StageSpec(
        "direct preference optimization on pairs of answers",
        options=(
            "loss_type",
            "loss_weights",
            "beta",
            "label_smoothing",
            "ld_alpha",
            "f_divergence_type",
            "f_alpha_divergence_coef",
            "use_weighting",
            "discopop_tau",
            "simpo_gamma",
            "cpo_alpha",
            "odpo_alpha",
            "reference",
            "mask_thinking",
        ),
    ),
    "kto": StageSpec(
        "Kahneman-Tversky optimization on answers that are labelled good or bad",
        records="labelled",
        options=("beta", "desirable_weight", "undesirable_weight", "reference", "mask_thinking"),
    ),
    "rm": StageSpec(
        "a reward model on such pairs",
        head="value",
        options=("margin_from_scores", "center_rewards_coefficient"),
    ),
}
STAGE_ALIASES = {"rw": "rm", "reward": "rm"}
