"""fp16: a step whose gradients overflow is computed again, and nothing but the scale tells that it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from dsdpo.errors import NumericError
from dsdpo.export.huggingface import export
from tests.helpers.fp16 import assert_same
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

pytestmark = pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="DeepSpeed has no fp16 on this CPU")
STEPS = 4
HIGH = {"initial_scale_power": 40}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp16")
    save_model(folder / "model", tiny_llama_config(hidden_size=36, intermediate_size=52, head_dim=10))
    save_tokenizer(folder / "model")
    return folder


def go(world: int, tasks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of each task, what each rank found."""
    return list(zip(*run_ranks("tests.helpers.fp16:go", world, tasks)))


def task(base: Path, folder: str, **more: Any) -> dict[str, Any]:
    common = {"model": str(base / "model"), "max_steps": STEPS, "until": STEPS, "max_tokens_per_row": 128}
    return {**common, "folder": str(base / folder), **more}


def steps_of(ranks: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What the lines of metrics.jsonl say of the training, without times, and how often a step was computed."""
    told = ("step", "loss", "grad_norm", "learning_rate", "loss_scale")
    return [{name: line[name] for name in told} for line in ranks[0]["lines"]]


KINDS: list[dict[str, Any]] = [
    {"stage": 0, "weight_decay": 0.1},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 2, "offload": True},
    {"stage": 3, "offload": True},
    {"stage": 1, "finetuning_type": "lora", "lora_dropout": 0.2},
    {"stage": 3, "finetuning_type": "lora", "reference": "live"},
    {"stage": 1, "reference": "live"},
    {"stage": 2, "objective": "rm", "finetuning_type": "lora"},
    {"stage": 1, "objective": "kto"},
    {"stage": 3, "persist": True},
]


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_overflows_is_computed_again(base: Path, world: int) -> None:
    """As if the run had begun at the scale that fits."""
    kinds = KINDS if world == 1 else KINDS[:4]
    high = go(world, [task(base, f"high-{world}-{n}", scale=HIGH, **kind) for n, kind in enumerate(kinds)])
    assert [ranks[0]["error"] for ranks in high] == [""] * len(kinds)
    powers = [int(math.log2(ranks[0]["lines"][0]["loss_scale"])) for ranks in high]
    fits = go(
        world,
        [
            task(base, f"fits-{world}-{n}", scale={"initial_scale_power": power}, **kind)
            for n, (kind, power) in enumerate(zip(kinds, powers))
        ],
    )
    for found, expected, power in zip(high, fits, powers):
        assert power < 40 and found[0]["lines"][0]["computed_again"] == 40 - power
        assert expected[0]["lines"][0]["computed_again"] == 0
        assert steps_of(found) == steps_of(expected)
        assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps_of(found))
        for rank, of_rank in zip(found, expected):
            assert rank["scale"][0] == {"loss_scale": {"scale": 2.0**40, "steps": 0}}
            assert rank["scale"][1] == of_rank["scale"][1] == found[0]["scale"][1]
            assert rank["steps"] == of_rank["steps"] == (STEPS, STEPS)
            assert_same(rank["state"], of_rank["state"])


def test_a_scale_that_grows_changes_nothing_but_rounding(base: Path) -> None:
    """DeepSpeed's own scaler would halve the gradients of each step after which it grows, unless they are clipped."""
    unclipped = {"stage": 1, "max_grad_norm": 100.0}
    constant, growing = go(
        1,
        [
            task(base, "constant", **unclipped, scale={"loss_scale": 1024}),
            task(base, "growing", **unclipped, scale={"initial_scale_power": 8, "loss_scale_window": 1}),
        ],
    )
    assert [line["loss_scale"] for line in constant[0]["lines"]] == [1024.0] * STEPS
    assert [line["loss_scale"] for line in growing[0]["lines"]] == [256.0, 512.0, 1024.0, 2048.0]
    assert growing[0]["scale"][1] == {"loss_scale": {"scale": 4096.0, "steps": 0}}
    for name in ("loss", "grad_norm"):
        found, expected = ([line[name] for line in run[0]["lines"]] for run in (growing, constant))
        np.testing.assert_allclose(found, expected, rtol=5e-3)
    for name, expected in constant[0]["state"].items():
        if name.startswith("exp_avg/"):
            found = growing[0]["state"][name]
            assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected), name


def test_a_checkpoint_keeps_the_scale(base: Path) -> None:
    """On as many ranks to the bit, and on another number and stage."""
    scale = {**HIGH, "loss_scale_window": 3}
    whole, half = go(
        2,
        [
            task(base, "whole", stage=3, scale=scale),
            task(base, "half", stage=3, scale=scale, until=2, save=True),
        ],
    )
    saved = half[0]["scale"][1]
    assert saved["loss_scale"]["steps"] == 2 and saved["loss_scale"]["scale"] < 2.0**40
    shutil.copytree(base / "half", base / "moved")
    (same,) = go(2, [task(base, "half", stage=3, scale=scale)])
    (moved,) = go(1, [task(base, "moved", stage=0, scale=scale, save=True, export=True)])
    assert same[0]["scale"][0] == same[1]["scale"][0] == moved[0]["scale"][0] == saved
    assert steps_of(same) == steps_of(whole) and same[1]["scale"][1] == whole[1]["scale"][1]
    for found, expected in zip(same, whole):
        assert_same(found["state"], expected["state"])
    np.testing.assert_allclose(steps_of(moved)[-1]["loss"], steps_of(whole)[-1]["loss"], rtol=0.02)
    assert_exported_alike(base / "moved" / "out", base / "assembled")


def assert_exported_alike(run: Path, folder: Path) -> None:
    """The weights at the end and those of the last checkpoint, in fp16."""
    export(run, folder, merge=False, step=STEPS)
    found, expected = (load_file(place / "model.safetensors") for place in (folder, run / "final"))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == torch.float16 and torch.equal(found[name], expected[name]) for name in expected)
    for place in (folder, run / "final"):
        assert json.loads((place / "config.json").read_text())["dtype"] == "float16"


def test_a_rank_whose_device_has_no_fp16_ends_with_64(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = run_ranks("tests.helpers.fp16:refused", 1, task(base, "refused", stage=1), fresh=True)
    assert found == [["no-fp16"]]


def test_where_no_scale_helps_the_run_ends_with_70(base: Path) -> None:
    """At the lowest scale, at a constant one, and where a loss itself is not finite."""
    floor, constant, nan = go(
        2,
        [
            task(base, "floor", stage=1, scale={**HIGH, "min_loss_scale": 2**30}),
            task(base, "constant-high", stage=3, scale={"loss_scale": 2.0**40}),
            task(base, "nan", stage=2, learning_rate=1e30, warmup_steps=0, scale={"initial_scale_power": 8}),
        ],
    )
    assert NumericError.exit_code == 70
    for rank in (*floor, *constant):
        assert "step 1: " in rank["error"] and "every loss is finite" in rank["error"]
        assert "fp16.min_loss_scale" in rank["error"] and "precision: bf16" in rank["error"]
    assert all(rank["scale"][1] == {"loss_scale": {"scale": 2.0**30, "steps": 0}} for rank in floor)
    for rank in nan:
        assert "step 2: the loss of " in rank["error"] and "no loss scale changes a loss" in rank["error"]
        assert rank["scale"][1]["loss_scale"]["scale"] == 2.0**8, "nothing was tried"
    assert not any(rank["lines"] for rank in (*floor, *constant))
