"""Live and cached references give the same training; losses across pairs are right wherever the pairs lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.grid import STEPS
from tests.helpers.ranks import run_ranks
from tests.helpers.real import smollm2
from tests.helpers.tiny import save_adapter, save_model, save_tokenizer, tiny_llama_config

PAIRS = 17
WORLDS = (1, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    model = save_model(folder / "base", tiny_llama_config(tied=True))
    save_tokenizer(folder / "base")
    save_adapter(folder / "adapter", model, folder / "base")
    return {name: str(folder / name) for name in ("base", "adapter", "cache")}


def run(cases: dict[Any, dict[str, Any]], world: int, cache: str) -> dict[Any, list[dict[str, float]]]:
    """case -> its metrics of each step. The ranks share the folder `cache`, which is new for each world size."""
    settings = [{**case, "cache_dir": f"{cache}-{world}"} for case in cases.values()]
    found = run_ranks("tests.dist.grid:run_cases", world, settings, PAIRS)[0]
    return {name: result["metrics"] for name, result in zip(cases, found)}


def reference_cases(models: dict[str, str]) -> dict[Any, dict[str, Any]]:
    """Each kind of model x ZeRO 1 to 3 x cached and live. In the continued run the adapter is the reference."""
    kinds = {
        "full": {"finetuning_type": "full"},
        "lora": {"finetuning_type": "lora"},
        "continued": {"finetuning_type": "lora", "adapter_name_or_path": models["adapter"]},
    }
    return {
        (kind, stage, reference): {
            "model": models["base"],
            "stage": stage,
            "reference": reference,
            "learning_rate": 0.01,
            "loss_type": "sigmoid",
            "loss_weights": [1.0],
            **settings,
        }
        for kind, settings in kinds.items()
        for stage in (1, 2, 3)
        for reference in ("cached", "live")
    }


@pytest.mark.parametrize("world", WORLDS)
def test_live_and_cached_references_agree(models: dict[str, str], world: int) -> None:
    found = run(reference_cases(models), world, models["cache"])
    for (kind, stage, reference), steps in found.items():
        losses = [step["loss"] for step in steps]
        assert len(losses) == STEPS and abs(losses[0] - np.log(2)) < 1e-5
        assert abs(losses[-1] - np.log(2)) > 1e-3, "training must have moved the policy away from the reference"
        if reference == "live":
            cached = [step["loss"] for step in found[kind, stage, "cached"]]
            np.testing.assert_allclose(losses, cached, rtol=1e-5, err_msg=f"{kind}, stage {stage}")


def test_the_first_loss_in_bf16(models: dict[str, str]) -> None:
    """Live and policy compute the same row, so the loss is log 2 exactly. The cached reference comes from other rows,
    in which matrix products round otherwise: its log-ratios are off by a few bf16 steps of the log-probs' size.
    """
    common = {"model": models["base"], "stage": 1, "precision": "bf16", "loss_type": "sigmoid", "loss_weights": None}
    kinds = {kind: {**common, "finetuning_type": "lora", "reference": kind} for kind in ("live", "cached")}
    first = {kind: steps[0] for kind, steps in run(kinds, 1, models["cache"]).items()}
    assert abs(first["live"]["loss"] - np.log(2)) < 1e-6 and first["live"]["rewards/margins"] == 0
    rounding = 2**-8 * 0.5 * abs(first["cached"]["logps/chosen"])  # beta is 0.5
    assert abs(first["cached"]["loss"] - np.log(2)) < rounding


@pytest.mark.slow
def test_policy_and_live_reference_are_halved_by_two_ranks(tmp_path: Path) -> None:
    """SmolLM2 under ZeRO-3: half the parameters each, whichever of the two engines."""
    alone, *pair = (
        run_ranks("tests.dist.grid:parameter_bytes", world, str(tmp_path), str(smollm2())) for world in (1, 2)
    )
    assert min(alone[0]) > 500e6, "134.5 million parameters in fp32"
    for rank in pair[0]:
        np.testing.assert_allclose(rank, np.array(alone[0]) / 2, rtol=0.01)


def loss_cases(model: str) -> dict[str, dict[str, Any]]:
    """Losses that see all pairs of a step at once, alone and in a mix, and some that need their own settings."""
    common = {"model": model, "stage": 2, "learning_rate": 0.01, "loss_weights": None}
    return {
        "aot": {**common, "loss_type": "aot"},
        "aot_unpaired, live": {**common, "loss_type": "aot_unpaired", "reference": "live"},
        "mix, ZeRO-3": {**common, "stage": 3, "loss_type": "aot,sigmoid,sft", "ld_alpha": 0.5},
        "simpo": {**common, "loss_type": "simpo", "beta": 2.0},
        "orpo": {**common, "loss_type": "orpo", "stage": 3},
    }


def test_losses_do_not_depend_on_where_pairs_lie(models: dict[str, str]) -> None:
    """World sizes 1 and 2, rows for the whole step and rows of few pairs: the same loss and gradient norm."""
    rows = {"whole": {}, "short": {"max_tokens_per_row": 128}}
    cases = {
        (name, length): {**case, **change}
        for name, case in loss_cases(models["base"]).items()
        for length, change in rows.items()
    }
    by_world = {world: run(cases, world, models["cache"]) for world in WORLDS}
    for world, found in by_world.items():
        for (name, length), steps in found.items():
            for key in ("loss", "grad_norm", "rewards/margins"):
                values = ([step[key] for step in steps], [step[key] for step in by_world[1][name, "whole"]])
                where = f"{name}, {world} ranks, {length} rows: {key}"
                np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5, err_msg=where)
