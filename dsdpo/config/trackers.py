"""Places that the metrics can go to besides metrics.jsonl: the trackers of accelerate, by the names of `report_to`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

ALL = "all"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab", "comet_ml", "clearml")  # their packages' names, too
IN_EXTRA = ("tensorboard", "wandb", "trackio")  # of `track`


def installed() -> list[str]:
    """Trackers whose package is installed here."""
    return [name for name in TRACKERS if importlib.util.find_spec(name) is not None]


def named_trackers(report_to: Sequence[str]) -> list[str]:
    """What `report_to` names; of `all`, those that are installed."""
    return installed() if list(report_to) == [ALL] else list(report_to)


def problem(report_to: Sequence[str]) -> str:
    """Why `report_to` cannot be followed here; empty where it can."""
    if ALL in report_to and len(report_to) > 1:
        return f"report_to is {','.join(report_to)}; `all` stands alone"
    there = installed()
    missing = [name for name in named_trackers(report_to) if name not in there]
    if not missing:
        return ""
    remedies = [f"pip install {name}" for name in missing if name not in IN_EXTRA]
    if len(remedies) < len(missing):
        remedies.insert(0, "pip install 'dsdpo[track]'")
    words = " and ".join(f"`{one}`" for one in remedies)
    return f"report_to names {', '.join(missing)}, not installed here; run {words}"
