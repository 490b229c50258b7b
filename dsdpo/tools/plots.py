"""Curves of a run as PNG files, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsdpo.errors import DataError, IOFailure
from dsdpo.runtime.rundir import RunDir

SMOOTHED_STEPS = 20
_EVAL = "eval_"
_BLUE, _RED, _GREEN = "#1f5fa8", "#c0392b", "#2e8b57"

Points = tuple[list[float], list[float]]


def plot(run_dir: RunDir) -> list[Path]:
    """Draw loss.png, rewards.png and accuracy.png into a run's folder.

    Args:
        run_dir: holds metrics.jsonl.

    Returns:
        The files written, in this order; a picture without any values is left out.

    Raises:
        DataError: no metrics.jsonl, one that is damaged before its last line, or one without a step.
        IOFailure: the folder cannot be written.
    """
    records = read_metrics(run_dir.metrics)
    pictures = {
        run_dir.loss_plot: ("Loss", "loss", [("loss", "loss", _BLUE)]),
        run_dir.rewards_plot: (
            "Rewards: beta * (log-prob of the policy - of the reference)",
            "reward",
            [
                ("rewards/chosen", "chosen", _BLUE),
                ("rewards/rejected", "rejected", _RED),
                ("rewards/margins", "margin", _GREEN),
            ],
        ),
        run_dir.accuracy_plot: (
            "Reward accuracy: share of pairs with chosen above rejected",
            "accuracy",
            [("rewards/accuracies", "accuracy", _BLUE)],
        ),
    }
    written = []
    for path, (title, unit, curves) in pictures.items():
        if any(_points(records, prefix + key)[0] for key, _, _ in curves for prefix in ("", _EVAL)):
            _draw(path, records, title, unit, curves)
            written.append(path)
    return written


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that is only half written. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; give the output_dir of a run that has begun") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is no record of a step ({error}); repair or remove the line") from error
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no step yet; wait for the first one")
    return records


def _points(records: list[dict[str, Any]], key: str) -> Points:
    """(steps, values) of the records that have the key."""
    found = [(float(record["step"]), float(record[key])) for record in records if record.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: list[float], span: int) -> list[float]:
    """Mean over the `span` values around each one, so that a falling curve is not drawn late; fewer at the ends."""
    half = span // 2
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _draw(path: Path, records: list[dict[str, Any]], title: str, unit: str, curves: list[tuple[str, str, str]]) -> None:
    """One picture: each curve's steps faint, its smoothed course strong, held-out values as points."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label, colour in curves:
        _curve(axes, records, key, label, colour)
    axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if unit == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=max(len(curves), 2), frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise IOFailure(f"cannot write {path}: {error}; free space or change the folder's rights") from error


def _curve(axes: Axes, records: list[dict[str, Any]], key: str, label: str, colour: str) -> None:
    steps, values = _points(records, key)
    if steps:
        span = min(SMOOTHED_STEPS, max(len(steps) // 5, 1))
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values, span), color=colour, linewidth=2, label=f"{label} (train, smoothed)")
    steps, values = _points(records, _EVAL + key)
    if steps:
        axes.plot(
            steps, values, "o--", color=colour, markeredgecolor="white", markersize=7, label=f"{label} (held-out)"
        )
