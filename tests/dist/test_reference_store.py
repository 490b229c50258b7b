"""Promise 3 on real ranks: what is stored is exact, found again when it should be, and made again when it must be."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, tiny_llama_config

N = 12
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def fill(folder: Path, *runs: dict[str, Any], world: int = 2) -> list[tuple[int, Any]]:
    return run_ranks("tests.dist.grid:fill_store", world, str(folder), list(runs))[0]


def variant(folder: Path, base: Path, norm: float | None = None, **config: str) -> Path:
    """A copy of a model with another final norm, or with replacements in its config."""
    shutil.copytree(base, folder)
    if norm is not None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], norm)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for old, new in config.items():
        text = (folder / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(folder, tiny_llama_config(tied=True))
    return folder


@pytest.fixture(scope="module")
def found(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Any]]:
    """What happened in runs of two ranks that share a store, in this order, and in some with a store of their own."""
    folder = base.parent
    run = {"model": str(base), "pairs": N}
    runs = {
        "first": run,
        "other training": {**run, "learning_rate": 0.5, "beta": 2.0, "seed": 7, "train_batch_size": 3},
        "other stage": {**run, "stage": 3},
        "other loss": {**run, "finetuning_type": "lora", "loss_type": "aot", "loss_weights": None, "ld_alpha": 0.3},
        "moved": {**run, "model": str(variant(folder / "moved", base))},
        "other layout": {**run, "share_prefix": False},
        "other weights": {**run, "model": str(variant(folder / "weights", base, norm=1.5))},
        "other config": {
            **run,
            "model": str(variant(folder / "config", base, **{'"rms_norm_eps": 1e-06': '"rms_norm_eps": 0.1'})),
        },
        "seen late by one rank": {**run, "blind": 1},
        "grown": {**run, "pairs": N + 5},
        "damaged": {**run, "damage": True, "store": "damaged"},
        "whole": {**run, "pairs": N + 5, "store": "whole"},
        "whole, stage 3": {**run, "pairs": N + 5, "store": "stage 3", "stage": 3},
        "not finite": {**run, "model": str(variant(folder / "infinite", base, norm=float("inf")))},
    }
    store = tmp_path_factory.mktemp("store")
    before = fill(store, {**run, "store": "damaged"})
    assert before[0][0] == N
    return dict(zip(runs, fill(store, *runs.values())))


@pytest.mark.parametrize("name", ["other training", "other stage", "other loss", "moved", "seen late by one rank"])
def test_reused_when_nothing_that_counts_has_changed(found: dict[str, tuple[int, Any]], name: str) -> None:
    assert found["first"][0] == N and found[name][0] == 0
    assert np.array_equal(found[name][1], found["first"][1])


@pytest.mark.parametrize("name", ["other layout", "other weights", "other config"])
def test_computed_again_when_weights_config_or_layout_change(found: dict[str, tuple[int, Any]], name: str) -> None:
    assert found[name][0] == N
    assert np.allclose(found[name][1], found["first"][1], **CLOSE) == (name == "other layout")


def test_a_grown_set_computes_its_new_pairs_only(found: dict[str, tuple[int, Any]]) -> None:
    assert found["grown"][0] == 5
    assert np.array_equal(found["grown"][1][:N], found["first"][1])


def test_what_is_stored_is_what_a_new_pass_computes(found: dict[str, tuple[int, Any]]) -> None:
    """On any ZeRO stage, whatever was computed together."""
    for name in ("whole", "whole, stage 3"):
        assert found[name][0] == N + 5
        np.testing.assert_allclose(found[name][1], found["grown"][1], **CLOSE)


def test_damaged_chunks_are_computed_again(found: dict[str, tuple[int, Any]]) -> None:
    assert 0 < found["damaged"][0] < N
    np.testing.assert_allclose(found["damaged"][1], found["first"][1], **CLOSE)


def test_a_log_prob_that_is_not_finite_stops_the_run(found: dict[str, tuple[int, Any]]) -> None:
    assert "no finite log-prob for 12 examples, the first at memory:1" in found["not finite"][1]


def test_a_killed_pass_goes_on_where_it_was(base: Path, tmp_path: Path, found: dict[str, tuple[int, Any]]) -> None:
    run = {"model": str(base), "pairs": N}
    with pytest.raises(AssertionError, match="ranks ended with"):
        fill(tmp_path, {**run, "die_after": 2})
    computed, values = fill(tmp_path, run)[0]
    assert 0 < computed < N
    np.testing.assert_allclose(values, found["first"][1], **CLOSE)


def test_two_jobs_at_once_share_a_store(base: Path, tmp_path: Path) -> None:
    runs = [{"model": str(base), "pairs": n} for n in (N, N + 4)]
    with ThreadPoolExecutor(2) as pool:
        values = list(pool.map(lambda run: fill(tmp_path, run, world=1)[0][1], runs))
    np.testing.assert_allclose(values[1][:N], values[0], **CLOSE)
    assert fill(tmp_path, {"model": str(base), "pairs": N + 4})[0][0] == 0
