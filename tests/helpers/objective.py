"""Objectives from the options that a test cares about."""

from __future__ import annotations

from typing import Any

from dsdpo.config.schema import RunConfig
from dsdpo.objectives.kto import KTOObjective
from dsdpo.objectives.preference import PreferenceObjective
from dsdpo.objectives.ranking import RankingObjective
from dsdpo.objectives.reward import RewardObjective
from dsdpo.objectives.supervised import SupervisedObjective

_REQUIRED = {"model_name_or_path": "-", "dataset": "-", "output_dir": "-"}


def preference_objective(weights: dict[str, float], **options: Any) -> PreferenceObjective:
    """The objective of loss type -> weight; `options` are those of a run config, the others at their defaults."""
    return PreferenceObjective(
        RunConfig(**_REQUIRED, loss_type=list(weights), loss_weights=list(weights.values()), **options)
    )


def reward_objective(**options: Any) -> RewardObjective:
    """The objective of stage rm."""
    return RewardObjective(RunConfig(**_REQUIRED, stage="rm", **options))


def supervised_objective(**options: Any) -> SupervisedObjective:
    """The objective of stage sft."""
    return SupervisedObjective(RunConfig(**_REQUIRED, stage="sft", **options))


def kto_objective(**options: Any) -> KTOObjective:
    """The objective of stage kto."""
    return KTOObjective(RunConfig(**_REQUIRED, stage="kto", **options))


def ranking_objective(loss_type: str, **options: Any) -> RankingObjective:
    """The objective of stage dpo over rankings."""
    return RankingObjective(RunConfig(**_REQUIRED, loss_type=loss_type, **options))
