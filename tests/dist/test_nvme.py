"""The optimizer's state on NVMe: the same training and checkpoints as in the CPU's memory, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.test_elastic import assert_same, saved_state
from tests.helpers.nvme import built_async_io
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

pytestmark = pytest.mark.slow

WORLD, SAVED_AFTER, STEPS = 2, 2, 4
KINDS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "learning_rate": 1e-4, "weight_decay": 0.1},
    "lora": {"finetuning_type": "lora", "learning_rate": 1e-3, "lora_rank": 64},
}
SUB_GROUPS = {"sub_group_size": 400_000, "offload_param": {"device": "cpu"}}  # of 2.7 or 0.5 million elements a rank
PLACES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cpu": {**SUB_GROUPS, "offload_optimizer": {"device": "cpu"}},
    "nvme": SUB_GROUPS,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 5.4 million parameters: DeepSpeed swaps nothing below 1 MiB."""
    if not built_async_io():
        pytest.skip("libaio with its headers is not installed (libaio-dev)")
    folder = tmp_path_factory.mktemp("nvme")
    sizes = {"hidden_size": 512, "intermediate_size": 1101, "initializer_range": 0.05}
    save_model(folder / "model", tiny_llama_config(**sizes))
    save_tokenizer(folder / "model")
    (folder / "disk").mkdir()
    return folder


def task(base: Path, kind: str, run: str, place: str, until: int, **more: Any) -> dict[str, Any]:
    """A run in one of PLACES; NVMe is `base`/disk."""
    zero = dict(PLACES[place])
    if place == "nvme":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(base / "disk")}
    common = {"model": str(base / "model"), "stage": 3, "max_steps": STEPS, "zero": zero, "until": until, "save": True}
    return {**common, **KINDS[kind], "folder": str(base / f"{kind}-{run}"), **more}


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_checkpoints_are_those_of_the_cpus_memory(base: Path, kind: str) -> None:
    """In one go, in two, and moved between NVMe, CPU and plain ZeRO-3: to the bit, where the arithmetic is the same."""

    def on_from(run: str) -> dict[str, Any]:
        checkpoint = base / f"{kind}-{run}/out/checkpoints/step-{SAVED_AFTER:08d}"
        return {"resume_from_checkpoint": str(checkpoint), "state": True}

    moves = [(a, b) for a in PLACES for b in PLACES if "nvme" in (a, b)]
    tasks = [task(base, kind, f"{place}-whole", place, STEPS) for place in PLACES]
    tasks += [task(base, kind, f"{place}-half", place, SAVED_AFTER) for place in PLACES]
    tasks += [task(base, kind, f"{a}-to-{b}", b, STEPS, **on_from(f"{a}-half")) for a, b in moves]
    found = run_ranks("tests.dist.moves:go", WORLD, tasks)[0]
    whole = dict(zip(PLACES, found))
    saved = {path.name: saved_state(path) for path in base.glob(f"{kind}-*")}
    assert whole["nvme"]["losses"] == whole["cpu"]["losses"]
    for part in ("whole", "half"):
        assert_same(saved[f"{kind}-nvme-{part}"], saved[f"{kind}-cpu-{part}"])
    for (a, b), moved in zip(moves, found[2 * len(PLACES) :]):
        assert_same(moved["state"], saved[f"{kind}-{a}-half"])
        wanted = whole["plain"]["losses"][SAVED_AFTER:]
        np.testing.assert_allclose(moved["losses"], wanted, rtol=1e-4, err_msg=f"{a} to {b}")
        if "plain" not in (a, b):
            assert moved["losses"] == whole["cpu"]["losses"][SAVED_AFTER:]
            assert_same(saved[f"{kind}-{a}-to-{b}"], saved[f"{kind}-cpu-whole"])
    for run in base.glob("disk/dsdpo-*"):
        assert len(list(run.glob("zero_stage_3/optimizer/rank1/exp_avg_sq-*.swp"))) > 0, "it must have been swapped"
