"""The objective of each stage. A new stage is a row of `dsdpo.config.stages.STAGES` and an entry here."""

from __future__ import annotations

from collections.abc import Callable

from dsdpo.config.losses import RANKINGS
from dsdpo.config.schema import RunConfig
from dsdpo.objectives.base import Objective
from dsdpo.objectives.kto import KTOObjective
from dsdpo.objectives.preference import PreferenceObjective
from dsdpo.objectives.ranking import RankingObjective
from dsdpo.objectives.reward import RewardObjective
from dsdpo.objectives.supervised import SupervisedObjective


def _of_preferences(config: RunConfig) -> Objective:
    return RankingObjective(config) if config.loss_type[0] in RANKINGS else PreferenceObjective(config)


OBJECTIVES: dict[str, Callable[[RunConfig], Objective]] = {
    "pt": SupervisedObjective,
    "sft": SupervisedObjective,
    "kto": KTOObjective,
    "dpo": _of_preferences,
    "rm": RewardObjective,
}


def objective_of(config: RunConfig) -> Objective:
    """The objective of a run's stage."""
    return OBJECTIVES[config.stage](config)
