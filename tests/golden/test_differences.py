"""The comparison of golden runs finds each kind of difference, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.golden import differences
from tests.golden.cases import CASES
from tests.golden.differences import Mode, compare

STEPS = [
    {"step": 1, "loss": 0.7, "rewards/accuracies": 0.5, "logps/chosen": -40.0, "grad_norm": 0.8, "step_time": 1.0},
    {"step": 1, "eval_loss": 0.69},
    {"step": 2, "loss": 0.6, "rewards/accuracies": 1.0, "logps/chosen": -39.0, "grad_norm": 0.7, "idle_share": 0.1},
]
RNG = np.random.default_rng(0)
INITIAL = {name: RNG.standard_normal((8, 8), np.float32) for name in ("a", "b")}
FULL = {name: tensor + 0.01 * RNG.standard_normal((8, 8), np.float32) for name, tensor in INITIAL.items()}
ADAPTER = {
    "x.lora_A.weight": RNG.standard_normal((2, 8), np.float32),
    "x.lora_B.weight": 0.1 * RNG.standard_normal((8, 2), np.float32),
}


def result(folder: Path, steps: list[dict[str, Any]] = STEPS, weights: dict[str, np.ndarray] = FULL) -> Path:
    """An output_dir."""
    (folder / "final").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    safetensors.numpy.save_file(weights, folder / "final" / "model.safetensors")
    return folder


def changed(line: int, **values: float) -> list[dict[str, Any]]:
    return [{**step, **values} if number == line else step for number, step in enumerate(STEPS)]


def found(tmp_path: Path, mode: Mode, base: dict[str, Any], tree: dict[str, Any]) -> list[str]:
    tmp_path.mkdir(exist_ok=True)
    safetensors.numpy.save_file(INITIAL, tmp_path / "initial.safetensors")
    sides = result(tmp_path / "base", **base), result(tmp_path / "tree", **tree)
    return compare(*sides, tmp_path / "initial.safetensors", mode).differences


def moved(weights: dict[str, np.ndarray], name: str, by: float) -> dict[str, np.ndarray]:
    """With one tensor's update off by a share of its size."""
    update = weights[name] - INITIAL.get(name, 0)
    return {**weights, name: (weights[name] + by * update).astype(np.float32)}


@pytest.mark.parametrize("mode", differences.MODES.values())
@pytest.mark.parametrize("steps", [STEPS, changed(0, step_time=5.0), changed(2, new_number=1.0)])
def test_the_same_run_is_equal(tmp_path: Path, mode: Mode, steps: list[dict[str, Any]]) -> None:
    """Times are not compared, and new numbers are allowed."""
    assert found(tmp_path, mode, {}, {"steps": steps}) == []


@pytest.mark.parametrize(
    ("tree", "modes"),
    [
        ({"steps": changed(2, loss=0.6 * (1 + 1e-7))}, {"exact"}),
        ({"steps": changed(2, loss=0.6 * (1 + 2e-5))}, {"exact", "tolerance"}),
        ({"steps": changed(1, eval_loss=0.69 * (1 + 2e-5))}, {"exact", "tolerance"}),
        ({"steps": changed(0, grad_norm=0.8 * (1 + 1e-5))}, {"exact"}),
        ({"steps": changed(0, grad_norm=0.9)}, {"exact", "tolerance"}),
        ({"steps": changed(0, **{"rewards/accuracies": 0.625})}, {"exact"}),
        ({"steps": changed(2, idle_share=0.2)}, {"exact"}),
        ({"steps": changed(0, loss=float("nan"))}, {"exact", "tolerance"}),
        ({"steps": STEPS[:2]}, {"exact", "tolerance"}),
        ({"steps": [STEPS[0], STEPS[1], {"step": 2, "loss": 0.6}]}, {"exact", "tolerance"}),
        ({"weights": moved(FULL, "a", 5e-5)}, {"exact"}),
        ({"weights": moved(FULL, "a", 1e-3)}, {"exact", "tolerance"}),
        ({"weights": {**FULL, "a": np.full_like(FULL["a"], np.nan)}}, {"exact", "tolerance"}),
        ({"weights": {"a": FULL["a"]}}, {"exact", "tolerance"}),
    ],
)
@pytest.mark.parametrize("mode", differences.MODES.values())
def test_another_run_differs(tmp_path: Path, mode: Mode, tree: dict[str, Any], modes: set[str]) -> None:
    assert bool(found(tmp_path, mode, {}, tree)) == (mode in modes)


@pytest.mark.parametrize(("by", "modes"), [(5e-5, {"exact"}), (1e-3, {"exact", "tolerance"})])
@pytest.mark.parametrize("name", ADAPTER)
@pytest.mark.parametrize("mode", differences.MODES.values())
def test_an_adapter_differs_by_its_product(tmp_path: Path, mode: Mode, name: str, by: float, modes: set[str]) -> None:
    base, tree = {"weights": ADAPTER}, {"weights": moved(ADAPTER, name, by)}
    assert bool(found(tmp_path, mode, base, tree)) == (mode in modes)


def test_a_renamed_key_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "RENAMED", {"loss": "mean_loss"})
    renamed = [{"mean_loss" if key == "loss" else key: value for key, value in step.items()} for step in STEPS]
    assert found(tmp_path, "exact", {}, {"steps": renamed}) == []
    renamed[0]["mean_loss"] = 0.71
    assert len(found(tmp_path / "again", "exact", {}, {"steps": renamed})) == 1


def test_a_base_run_that_changed_no_weight_is_an_error(tmp_path: Path) -> None:
    assert found(tmp_path, "tolerance", {"weights": INITIAL}, {"weights": INITIAL})


def test_a_resumed_case_stands_after_its_source() -> None:
    """With the same options but for when it saves, so that the checkpoint is that of its own run."""
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        if case.resumes:
            source = CASES[names.index(case.resumes)]
            assert names.index(source.name) < names.index(case.name) and source.ranks != case.ranks
            assert {**source.options, "save_steps": None} == {**case.options, "save_steps": None}
