"""Promise 3 on real ranks: what is stored is exact, found again when it should be, and made again when it must be."""

from __future__ import annotations

import os
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


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", tiny_llama_config(tied=True))
    return tmp_path / "base"


def fill(folder: Path, *runs: dict[str, Any], world: int = 2) -> list[tuple[int, np.ndarray]]:
    return run_ranks("tests.dist.grid:fill_store", world, str(folder), list(runs))[0]


def test_reused_when_nothing_that_counts_has_changed(base: Path, tmp_path: Path) -> None:
    """Learning rate, beta, seed, row length, ZeRO stage, losses, LoRA, another path: all the same reference."""
    moved = shutil.copytree(base, tmp_path / "moved")
    same = [
        {"model": str(base)},
        {"model": str(base), "learning_rate": 0.5, "beta": 2.0, "seed": 7, "train_batch_size": 3},
        {"model": str(base), "stage": 3},
        {"model": str(base), "finetuning_type": "lora", "loss_type": "aot", "loss_weights": None, "ld_alpha": 0.3},
        {"model": str(moved)},
    ]
    found = fill(tmp_path / "store", *({**run, "pairs": N} for run in same))
    assert [computed for computed, _ in found] == [N, 0, 0, 0, 0]
    assert all(np.array_equal(values, found[0][1]) for _, values in found)
    alone = fill(tmp_path / "alone", {"model": str(base), "pairs": N, "stage": 3}, world=1)[0][1]
    np.testing.assert_allclose(alone, found[0][1], rtol=1e-5, atol=1e-4)


def test_computed_again_when_weights_config_or_layout_change(base: Path, tmp_path: Path) -> None:
    """Also for a checkpoint replaced in place, with the old file's size and date."""
    first = {"model": str(base), "pairs": N}
    assert fill(tmp_path / "store", first)[0][0] == N
    assert fill(tmp_path / "store", {**first, "share_prefix": False})[0][0] == N

    weights = base / "model.safetensors"
    dates = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    os.utime(weights, ns=dates)
    computed, changed = fill(tmp_path / "store", first)[0]
    assert computed == N

    config = base / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    computed, again = fill(tmp_path / "store", first)[0]
    assert computed == N and not np.allclose(again, changed)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_grown_set_computes_its_new_pairs_only(base: Path, tmp_path: Path, stage: int) -> None:
    run = {"model": str(base), "stage": stage}
    few, many = fill(tmp_path / "store", {**run, "pairs": N}, {**run, "pairs": N + 5})
    assert (few[0], many[0]) == (N, 5)
    assert np.array_equal(many[1][:N], few[1])
    np.testing.assert_allclose(many[1], fill(tmp_path / "new", {**run, "pairs": N + 5})[0][1], rtol=1e-5, atol=1e-4)


def test_a_killed_pass_goes_on_where_it_was(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ranks ended with"):
        fill(tmp_path / "store", {"model": str(base), "pairs": N, "die_after": 2})
    computed, values = fill(tmp_path / "store", {"model": str(base), "pairs": N})[0]
    assert 0 < computed < N
    whole = fill(tmp_path / "new", {"model": str(base), "pairs": N})[0][1]
    np.testing.assert_allclose(values, whole, rtol=1e-5, atol=1e-4)


def test_damaged_chunks_are_computed_again(base: Path, tmp_path: Path) -> None:
    before = fill(tmp_path / "store", {"model": str(base), "pairs": N})[0][1]
    first, second, *_ = sorted(tmp_path.glob("store/reference/*/*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-3] ^= 4
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:20])
    (computed, after), (again, _) = fill(tmp_path / "store", *({"model": str(base), "pairs": N} for _ in range(2)))
    assert 0 < computed < N and again == 0
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)


def test_two_jobs_at_once_share_a_store(base: Path, tmp_path: Path) -> None:
    runs = [{"model": str(base), "pairs": n} for n in (N, N + 4)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda run: fill(tmp_path / "store", run, world=1)[0][1], runs))
    np.testing.assert_allclose(found[1][:N], found[0], rtol=1e-5, atol=1e-4)
    assert fill(tmp_path / "store", {"model": str(base), "pairs": N + 4})[0][0] == 0


def test_a_pair_that_has_no_finite_log_prob_stops_the_run(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.inf)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match=r"no finite log-prob for 12 pairs, the first at memory:1"):
        fill(tmp_path / "store", {"model": str(base), "pairs": N}, world=1)
