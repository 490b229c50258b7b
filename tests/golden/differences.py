"""How two results of one golden run differ: the numbers of metrics.jsonl and the final weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import safetensors.numpy

Mode: TypeAlias = Literal["exact", "tolerance"]
MODES: dict[str, Mode] = {"exact": "exact", "tolerance": "tolerance"}

LOSS_TOLERANCE = 1e-5  # relative
WEIGHT_TOLERANCE = 1e-4  # of the size of the update
OTHER_TOLERANCE = 1e-4  # relative, and absolute for numbers below 1: rewards are differences of log-probs

RENAMED: dict[str, str] = {}  # key in metrics.jsonl of the base commit -> its name now
LOSSES = {"loss", "eval_loss"}
# Compared in exact mode only. In the first step the margin is 0 but for rounding, which decides the accuracy; and the
# idle share follows from how the pairs are packed.
EXACT_ONLY = {"rewards/accuracies", "eval_rewards/accuracies", "idle_share"}
NOT_COMPARED = {  # time, speed, memory
    "step_time",
    "logical_tokens_per_second",
    "physical_tokens_per_second",
    "memory_peak_gb",
    "host_share",
}


@dataclass
class Comparison:
    """What was found for one run.

    Attributes:
        loss: largest relative difference of a loss.
        weights: norm of the difference of all weights over the norm of the base run's update.
        worst: the tensor with the largest such ratio of its own, and that ratio; empty where all are equal.
        differences: what is beyond the mode's bounds, a line each.
    """

    loss: float = 0.0
    weights: float = 0.0
    worst: str = ""
    differences: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One word, for the table."""
        if self.differences:
            return "DIFFERS"
        return "within" if self.loss or self.weights else "equal"


def compare(base: Path, tree: Path, initial: Path, mode: Mode) -> Comparison:
    """Compare two output folders of one case.

    Args:
        base, tree: output_dir of the run on the base commit, and on the working tree.
        initial: safetensors file of the model that both began with.
    """
    found = Comparison()
    _compare_metrics(_records(base), _records(tree), mode, found)
    _compare_weights(_weights(base), _weights(tree), safetensors.numpy.load_file(initial), mode, found)
    return found


def _records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _weights(out: Path) -> dict[str, np.ndarray]:
    files = sorted((out / "final").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.numpy.load_file(file).items()}


def _compare_metrics(base: list[dict[str, float]], tree: list[dict[str, float]], mode: Mode, found: Comparison) -> None:
    """Every number that is not in NOT_COMPARED. A key that only the tree has is new, and not compared."""
    if len(base) != len(tree):
        found.differences.append(f"metrics.jsonl: {len(base)} lines at the base commit, {len(tree)} now")
    for number, (was, now) in enumerate(zip(base, tree), 1):
        for key in was.keys() - NOT_COMPARED:
            name = RENAMED.get(key, key)
            where = f"line {number} of metrics.jsonl (step {was['step']:g}): {key}"
            if name not in now:
                found.differences.append(f"{where} is missing now; RENAMED in {Path(__file__).name} lists renamed keys")
                continue
            a, b = was[key], now[name]
            relative = 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))
            if key in LOSSES:
                found.loss = max(found.loss, relative)
            if not _same_number(key, a, b, mode):
                found.differences.append(f"{where} was {a!r}, is {b!r} (relative difference {relative:.1e})")


def _same_number(key: str, a: float, b: float, mode: Mode) -> bool:
    if mode == "exact":
        return a == b
    if key in LOSSES:
        return bool(np.isclose(b, a, rtol=LOSS_TOLERANCE, atol=0.0))
    if key in EXACT_ONLY:
        return True
    return bool(np.isclose(b, a, rtol=OTHER_TOLERANCE, atol=OTHER_TOLERANCE))


def _compare_weights(
    base: dict[str, np.ndarray],
    tree: dict[str, np.ndarray],
    initial: dict[str, np.ndarray],
    mode: Mode,
    found: Comparison,
) -> None:
    if not base or base.keys() != tree.keys():
        odd = sorted(base.keys() ^ tree.keys())
        found.differences.append(f"final weights: {len(base)} tensors at the base commit, {len(tree)} now: {odd[:3]}")
        return
    unequal = [name for name in base if base[name].tobytes() != tree[name].tobytes()]
    was, now = updates(base, initial), updates(tree, initial)
    square = {name: (_square(now[name] - was[name]), _square(was[name])) for name in was}
    missed, size = (float(np.sqrt(sum(values))) for values in zip(*square.values()))
    if not size > 0:
        found.differences.append("final weights: the base run changed no weight, so there is nothing to compare")
        return
    found.weights = missed / size
    if found.weights:
        ratio = {name: np.sqrt(a / b) if b else np.inf for name, (a, b) in square.items() if a}
        name = max(ratio, key=lambda name: ratio[name])
        found.worst = f"{name} ({ratio[name]:.1e})"
    if mode == "exact" and unequal:
        found.differences.append(f"final weights: {len(unequal)} of {len(base)} tensors differ, such as {unequal[0]}")
    if mode == "tolerance" and not found.weights <= WEIGHT_TOLERANCE:
        found.differences.append(f"final weights: {found.weights:.1e} of the update, most in {found.worst}")


def updates(weights: dict[str, np.ndarray], initial: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training has added to each tensor, in fp64.

    For an adapter it is the product B A, which is 0 at the start: the initial A is not among the files of a run.
    """
    found = {}
    for name, value in weights.items():
        if ".lora_A." in name:
            found[name.replace(".lora_A.", ".lora.")] = weights[name.replace(".lora_A.", ".lora_B.")].astype(
                np.float64
            ) @ value.astype(np.float64)
        elif ".lora_B." not in name:
            found[name] = value.astype(np.float64) - initial[name]
    return found


def _square(values: np.ndarray) -> float:
    return float(np.sum(values**2))
