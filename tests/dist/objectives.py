"""Training with the objective of each stage; runs on every rank of a group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.engine import start_process_group
from dsdpo.engine.zero_state import STATES
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config, take_steps
from tests.dist.moves import StopAfter, state_of
from tests.helpers.objectives import examples_for

EXAMPLES = 5  # steps of 4 examples and of 1


def train_objectives(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train each case for a few steps in one process group.

    Args:
        cases: changes to `run_config`, and: `objective`, a stage, or `ranking`; `zero`, the ZeRO stage; `masks` and
            `weights`, see `examples_for`; `folder`, of the run, where a checkpoint of an earlier case may be; `until`,
            the step to stop after; `save`, whether to save then.

    Returns:
        For each: `metrics` of each step of the folder's runs so far, and of the evaluation behind the last one, on rank
        0; `weights`, name -> fp32; `examples`, of this rank's micro-batches in the first two steps.
    """
    mesh = launched()
    assert mesh is not None
    results = []
    for case in cases:
        changes = dict(case)
        objective, folder = changes.pop("objective"), Path(changes.pop("folder"))
        made = {key: changes.pop(key, True) for key in ("masks", "weights")}
        saves, until = changes.pop("save", False), changes.pop("until", None)
        folder.mkdir(parents=True, exist_ok=True)
        if objective == "ranking":
            changes |= {"loss_type": "plackett_luce", "loss_weights": None}
        stage = "dpo" if objective == "ranking" else objective
        config = run_config(folder=folder, stage=changes.pop("zero"), **changes).model_copy(update={"stage": stage})
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        source = examples_for(objective, EXAMPLES, **made)
        held_out = examples_for(objective, EXAMPLES + 2, seed=1, **made)
        run = set_up(config, zero, mesh, hardware, source, held_out, StopFlag(RunDir(folder)))
        batches = list(run.loader.training_batches(range(2), config.train_batch_size, config.seed))
        if until is not None:
            run.stop_flag = StopAfter(run, until)  # type: ignore[assignment]
        done = take_steps(run)
        assert until is None or done == until
        if saves:
            run.saver.save(done)
            run.saver.finish()
        run.evaluate(done)
        run.reporter.close()
        metrics = Path(config.output_dir, "metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if mesh.is_main else []
        results.append(
            {
                "metrics": [line for line in lines if "loss" in line],
                "evaluations": [line for line in lines if "eval_loss" in line],
                "weights": _weights(run),
                "examples": [[len(m.examples) for m in batch.micro_batches] for batch in batches],
            }
        )
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def _weights(run: Any) -> dict[str, np.ndarray]:
    """Trained parameters by name, whole. A collective call."""
    prefix = f"{STATES[0]}/"
    return {name.removeprefix(prefix): x for name, x in state_of(run).items() if name.startswith(prefix)}
