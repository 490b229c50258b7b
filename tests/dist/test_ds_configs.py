"""Every file in ds_configs/ trains as it stands, but for what a user sets in it, and as without ZeRO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.grid import STEPS
from tests.helpers.nvme import built_async_io
from tests.helpers.ranks import ROOT, run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

pytestmark = pytest.mark.slow

FILES = sorted((ROOT / "ds_configs").iterdir())
WORLD = 2


def as_set(file: Path, disk: Path) -> dict[str, Any]:
    """A file's content with this machine's ranks per node and disk."""
    data: dict[str, Any] = json.loads(file.read_text())
    zero = data["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = WORLD
    if "nvme_path" in zero.get("offload_optimizer", {}):
        zero["offload_optimizer"]["nvme_path"] = str(disk)
    return data


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_file_trains(tmp_path: Path, kind: str) -> None:
    """On a model with matrices that ZeRO-3 partitions by default."""
    save_model(tmp_path / "model", tiny_llama_config(hidden_size=512, intermediate_size=1100, initializer_range=0.05))
    save_tokenizer(tmp_path / "model")
    common = {"model": str(tmp_path / "model"), "finetuning_type": kind, "learning_rate": 1e-4, "lora_rank": 64}
    cases = [{**common, "cache_dir": str(tmp_path / "cache")}]
    has_libaio = built_async_io()
    for file in FILES:
        if "nvme" in file.name and not has_libaio:
            continue
        (tmp_path / file.name).write_text(json.dumps(as_set(file, tmp_path)))
        cases.append({**cases[0], "deepspeed": str(tmp_path / file.name)})
    plain, *found = run_ranks("tests.dist.grid:run_cases", WORLD, cases, 17)[0]
    wanted = [(step["loss"], step["grad_norm"]) for step in plain["metrics"]]
    assert len(wanted) == STEPS and len(found) >= 5 and np.ptp(wanted, axis=0)[0] > 0.01
    for case, result in zip(cases[1:], found):
        losses = [(step["loss"], step["grad_norm"]) for step in result["metrics"]]
        np.testing.assert_allclose(losses, wanted, rtol=1e-4, err_msg=case["deepspeed"])
