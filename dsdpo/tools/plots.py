"""Curves of a run, or of several in one picture, as PNG files, from metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsdpo.errors import DataError, IOFailure
from dsdpo.runtime.rundir import RunDir

SMOOTHED_STEPS = 20
_EVAL = "eval_"
_BLUE, _RED, _GREEN = "#1f5fa8", "#c0392b", "#2e8b57"
_OF_RUNS = (_BLUE, _RED, _GREEN, "#8e44ad", "#d68910", "#16a085", "#7f8c8d", "#2c3e50")

Points = tuple[list[float], list[float]]
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One metric of one run: its values in `records` under `key`, and its name and colour in the picture."""

    records: Records
    key: str
    label: str
    colour: str

    def points(self, prefix: str = "") -> Points:
        """(steps, values), with the prefix `eval_` of the held-out examples."""
        key = prefix + self.key
        found = [(float(one["step"]), float(one[key])) for one in self.records if one.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]


def draw(folders: Sequence[Path], to: str | None = None) -> list[Path]:
    """The pictures of a run in its folder, or those of several runs over each other in the folder `to`."""
    if len(folders) == 1 and to is None:
        return plot(RunDir(folders[0]))
    target = Path(to or "comparison")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IOFailure(f"cannot make the folder {target}: {error}; give another one with --to") from error
    return overlay([RunDir(folder) for folder in folders], target)


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
    rewards = [("chosen", _BLUE), ("rejected", _RED), ("margins", _GREEN)]
    sides = [Curve(records, f"rewards/{name}", name.removesuffix("s"), colour) for name, colour in rewards]
    run = _described(run_dir)
    pictures = [
        (run_dir.loss_plot, "Loss", "loss", [Curve(records, "loss", "loss", _BLUE)]),
        (run_dir.rewards_plot, "Rewards: beta * (log-prob of the policy - of the reference)", "reward", sides),
        (
            run_dir.accuracy_plot,
            "Reward accuracy: share of pairs with chosen above rejected",
            "accuracy",
            [Curve(records, "rewards/accuracies", "accuracy", _BLUE)],
        ),
    ]
    return [path for path, title, unit, curves in pictures if _draw(path, f"{title}\n{run}", unit, curves)]


def overlay(run_dirs: Sequence[RunDir], folder: Path) -> list[Path]:
    """Draw the losses, reward margins and accuracies of several runs into one picture each, in `folder`.

    Returns and raises as `plot` does.
    """
    titles = [run_title(run_dir) for run_dir in run_dirs]
    labels = titles if len({*titles}) == len(titles) else [str(run_dir) for run_dir in run_dirs]
    runs = [(read_metrics(run_dir.metrics), label) for run_dir, label in zip(run_dirs, labels)]
    target = RunDir(folder)
    pictures = [
        (target.loss_plot, "Loss", "loss", "loss"),
        (target.rewards_plot, "Reward margin: chosen - rejected", "reward", "rewards/margins"),
        (target.accuracy_plot, "Reward accuracy", "accuracy", "rewards/accuracies"),
    ]
    written = []
    for path, title, unit, key in pictures:
        curves = [Curve(records, key, label, colour) for (records, label), colour in zip(runs, cycle(_OF_RUNS))]
        if _draw(path, title, unit, curves):
            written.append(path)
    return written


def _options(run_dir: RunDir) -> dict[str, Any]:
    """What run_config.yaml says; empty where there is none: only the title misses it."""
    try:
        found = yaml.safe_load(run_dir.run_config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def run_title(run_dir: RunDir) -> str:
    """A run's name: `run_name`, or that of its folder."""
    return str(_options(run_dir).get("run_name") or run_dir.path.resolve().name)


def _described(run_dir: RunDir) -> str:
    """Run, model and data in one line."""
    options = _options(run_dir)
    model = "/".join(Path(str(options.get("model_name_or_path", ""))).parts[-2:])
    data = ", ".join(map(str, options.get("dataset") or []))
    data = data if len(data) <= 60 else f"{data[:59]}\u2026"
    return "  |  ".join(filter(None, [run_title(run_dir), model, data]))


def read_metrics(path: Path) -> Records:
    """The records of a metrics.jsonl, without a last line that is only half written. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; give the output_dir of a run that has begun") from error
    records: Records = []
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


def smooth(values: list[float], span: int) -> list[float]:
    """Exponential average over about `span` values, which begins at the first one: each average is divided by the sum
    of its weights, as Adam does with its moments."""
    decay = 1 - 2 / (span + 1)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed


def _draw(path: Path, title: str, unit: str, curves: list[Curve]) -> bool:
    """One picture: each curve's steps as faint points, their average as a line, held-out values as circles.

    Returns whether there was anything to draw.
    """
    if not any(curve.points(prefix)[0] for curve in curves for prefix in ("", _EVAL)):
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        _draw_curve(axes, curve)
    axes.set(xlabel="optimizer step", ylabel=unit)
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if unit == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(max(len(curves), 2), 4), frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise IOFailure(f"cannot write {path}: {error}; free space or change the folder's rights") from error
    return True


def _draw_curve(axes: Axes, curve: Curve) -> None:
    steps, values = curve.points()
    if steps:
        span = min(SMOOTHED_STEPS, max(len(steps) // 5, 1))
        axes.plot(steps, values, ".", color=curve.colour, alpha=0.3, markersize=4, markeredgewidth=0)
        label = f"{curve.label} (train, average of {span} steps)" if span > 1 else f"{curve.label} (train)"
        axes.plot(steps, smooth(values, span), color=curve.colour, linewidth=2, label=label)
    steps, values = curve.points(_EVAL)
    if steps:
        label = f"{curve.label} (held-out)"
        axes.plot(steps, values, "o--", color=curve.colour, markeredgecolor="white", markersize=7, label=label)
