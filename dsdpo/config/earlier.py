"""Defaults of earlier versions, for runs that were begun with them.

A run that is begun today takes today's defaults. Where output_dir, or the checkpoint that is named, holds a run that
was begun with another default, an option that is not set keeps what it had then: so the same command goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dsdpo.config.schema import RunConfig
from dsdpo.runtime.rundir import RunDir

# option -> what it was where nothing set it, before the default that schema.py has now
EARLIER_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "truncation_mode": "keep_start",
    "val_split": "example",
}


def earlier_values(values: Mapping[str, Any], fresh: bool = False) -> dict[str, Any]:
    """Options that are not set, and had an earlier default in the run that output_dir holds; an option that the run
    does not name had it too.

    Args:
        values: option -> value, of those that are set.
        fresh: whether what output_dir holds will be moved aside.
    """
    saved = next(_saved_runs(values, fresh), None)
    if saved is None:
        return {}
    return {
        option: value
        for option, value in EARLIER_DEFAULTS.items()
        if option in RunConfig.model_fields and values.get(option) is None and saved.get(option, value) == value
    }


def recorded_batch(values: Mapping[str, Any], fresh: bool = False) -> int | None:
    """The train_batch_size that the run in output_dir was begun with; None where there is no such run."""
    for saved in _saved_runs(values, fresh):
        if isinstance(found := saved.get("train_batch_size"), int):
            return found
    return None


def remark(kept: Mapping[str, Any], config: RunConfig) -> str:
    """What to say of options that have kept an earlier default; empty where today's is the same."""
    others = {key: value for key, value in config.model_dump().items() if key not in kept}
    today = RunConfig.model_validate(others)
    differing = [f"{key} {value}" for key, value in kept.items() if getattr(today, key) != value]
    if not differing:
        return ""
    return f"{config.output_dir} holds a run of an earlier version, whose defaults count on: {', '.join(differing)}"


def _saved_runs(values: Mapping[str, Any], fresh: bool) -> Iterator[Mapping[str, Any]]:
    """Options of the run that would be continued, from each file that names them, the best first."""
    named, output_dir = values.get("resume_from_checkpoint"), values.get("output_dir")
    files = [Path(named) / "run.json"] if isinstance(named, str) and named else []
    if isinstance(output_dir, str) and output_dir and not fresh:
        run_dir = RunDir(Path(output_dir))
        files = [*sorted(run_dir.checkpoints.glob("step-*[0-9]/run.json"), reverse=True), *files]
        files.append(run_dir.run_config)
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            found = json.loads(text)["config"] if file.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
        if isinstance(found, dict):
            yield found
