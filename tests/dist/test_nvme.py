"""The optimizer's state on NVMe: the same training and checkpoints as in the CPU's memory, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.compat import can_swap
from tests.dist.test_elastic import assert_same, saved_state
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

pytestmark = pytest.mark.skipif(not can_swap(), reason="libaio with its headers is not installed (libaio-dev)")

WORLD, SAVED_AFTER, STEPS = 2, 2, 4
SUB_GROUPS = {"sub_group_size": 400_000, "offload_param": {"device": "cpu"}}  # of 2.7 million elements a rank
PLACES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cpu": {**SUB_GROUPS, "offload_optimizer": {"device": "cpu"}},
    "nvme": SUB_GROUPS,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 5.4 million parameters: DeepSpeed swaps nothing below 1 MiB."""
    folder = tmp_path_factory.mktemp("nvme")
    sizes = {"hidden_size": 512, "intermediate_size": 1101, "initializer_range": 0.05}
    save_model(folder / "model", tiny_llama_config(**sizes))
    save_tokenizer(folder / "model")
    (folder / "disk").mkdir()
    return folder


def task(base: Path, run: str, place: str, until: int, **more: Any) -> dict[str, Any]:
    """A run in one of PLACES; the optimizer's state is on `base`/disk."""
    zero = dict(PLACES[place])
    if place == "nvme":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(base / "disk")}
    common = {"model": str(base / "model"), "stage": 3, "max_steps": STEPS, "learning_rate": 1e-4, "weight_decay": 0.1}
    return {**common, "zero": zero, "folder": str(base / run), "until": until, "save": True, **more}


def on_from(base: Path, run: str) -> dict[str, Any]:
    checkpoint = base / run / f"out/checkpoints/step-{SAVED_AFTER:08d}"
    return {"resume_from_checkpoint": str(checkpoint), "state": True}


def test_training_and_checkpoints_are_those_of_the_cpus_memory(base: Path) -> None:
    """In one go, in two, and moved between NVMe, CPU and plain ZeRO-3: to the bit, where the arithmetic is the same."""
    tasks = [task(base, f"{place}-whole", place, STEPS) for place in PLACES]
    tasks += [task(base, f"{place}-half", place, SAVED_AFTER) for place in PLACES]
    moves = [(a, b) for a in PLACES for b in PLACES if "nvme" in (a, b)]
    tasks += [task(base, f"{a}-to-{b}", b, STEPS, **on_from(base, f"{a}-half")) for a, b in moves]
    found = run_ranks("tests.dist.moves:go", WORLD, tasks)[0]
    whole = dict(zip(PLACES, found))
    assert whole["nvme"]["losses"] == whole["cpu"]["losses"]
    for part in ("whole", "half"):
        assert_same(saved_state(base / f"nvme-{part}"), saved_state(base / f"cpu-{part}"))
    for (a, b), moved in zip(moves, found[2 * len(PLACES) :]):
        assert_same(moved["state"], saved_state(base / f"{a}-half"))
        np.testing.assert_allclose(moved["losses"], whole["plain"]["losses"][SAVED_AFTER:], rtol=1e-4, err_msg=f"{a}, {b}")
        if "plain" not in (a, b):
            assert moved["losses"] == whole["cpu"]["losses"][SAVED_AFTER:]
            assert_same(saved_state(base / f"{a}-to-{b}"), saved_state(base / "cpu-whole"))
