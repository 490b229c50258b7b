"""Training reward models; runs on every rank of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdpo.config.zero import ZeroConfig
from dsdpo.data.packing import build_micro_batch
from dsdpo.engine.engine import start_process_group
from dsdpo.model.packed import PackedInputs
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config, take_steps
from tests.helpers.tiny import ListOfExamples, random_pairs

SCORED = 6  # pairs whose rewards are compared


def train_rewards(cases: list[dict[str, Any]], folders: list[str]) -> list[np.ndarray]:
    """Train each case for a few steps, save and export it to its folder.

    Returns:
        The engine's rewards for SCORED pairs, fp32 [SCORED, 2], of each case.
    """
    mesh = launched()
    assert mesh is not None
    results = []
    for case, folder in zip(cases, folders, strict=True):
        config = run_config(folder=Path(folder), **case).model_copy(update={"stage": "rm"})
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        pairs = ListOfExamples(random_pairs(17))
        run = set_up(config, zero, mesh, hardware, pairs, None, StopFlag(RunDir(Path(folder))))
        take_steps(run)
        run.saver.save(config.max_steps or 0)
        run.saver.finish()
        run.export()
        run.engine.eval()
        micro_batch = build_micro_batch(random_pairs(SCORED), range(SCORED), share_prefix=True)
        with torch.no_grad():
            values = run.engine(PackedInputs.of(micro_batch, hardware.device)).values
        results.append(values.view(-1, 2).numpy())
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return results
