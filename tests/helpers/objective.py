"""A preference objective from the options that a test cares about."""

from __future__ import annotations

from typing import Any

from dsdpo.config.schema import RunConfig
from dsdpo.objectives.preference import PreferenceObjective


def preference_objective(weights: dict[str, float], **options: Any) -> PreferenceObjective:
    """The objective of loss type -> weight; `options` are those of a run config, the others at their defaults."""
    required = {"model_name_or_path": "-", "dataset": "-", "output_dir": "-"}
    return PreferenceObjective(
        RunConfig(**required, loss_type=list(weights), loss_weights=list(weights.values()), **options)
    )
