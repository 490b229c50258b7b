"""Saving, loading and going on in many settings; runs on every rank of a group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.engine import start_process_group
from dsdpo.engine.zero_state import MOMENTS, STATES
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.run import Run
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config, take_steps
from tests.helpers.objectives import examples_for
from tests.helpers.tiny import ListOfExamples, random_pairs

PAIRS = 21


def state_of(run: Run) -> dict[str, np.ndarray]:
    """`state/parameter` -> what DeepSpeed itself gives for it, whole. A collective call."""
    state: dict[str, np.ndarray] = {}
    optimizer = run.engine.optimizer
    for name, parameter in run.engine.module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if run.engine.zero_optimization():
            values = [safe_get_full_fp32_param(parameter)]
            values += [safe_get_full_optimizer_state(parameter, key) for key in MOMENTS]
        else:
            values = [parameter.data, *(optimizer.state[parameter][key] for key in MOMENTS)]
        for key, value in zip(STATES, values):
            state[f"{key}/{name}"] = value.detach().float().cpu().numpy().copy()
    return state


def go(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several stretches of runs, one after another in one process group.

    Args:
        tasks: changes to `run_config`, and: `objective`, a stage, dpo by default; `folder`, of the run; `until`, the
            step to stop after (its learning rates are those of the whole run); `save`, whether to save then; `state`,
            whether to return what DeepSpeed holds before the first step.

    Returns:
        For each: `losses` of all its steps so far, as its metrics say; `state`.
    """
    mesh = launched()
    assert mesh is not None
    results = []
    for number, task in enumerate(tasks):
        task = dict(task)
        folder, until = Path(task.pop("folder")), task.pop("until")
        saves, looks, objective = task.pop("save", False), task.pop("state", False), task.pop("objective", "dpo")
        folder.mkdir(parents=True, exist_ok=True)
        config = run_config(folder=folder, save_steps=None, **task).model_copy(update={"stage": objective})
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        source = ListOfExamples(random_pairs(PAIRS))
        if objective in ("pt", "sft", "kto"):
            source = examples_for(objective, PAIRS)
        run = set_up(config, zero, mesh, hardware, source, None, StopFlag(RunDir(folder)))
        state = state_of(run) if looks else {}
        total = run.schedule.total_steps
        stop = StopAfter(run, until)
        run.stop_flag = stop  # type: ignore[assignment]
        done = take_steps(run) if run.first_step < until else run.first_step
        assert done == until, (number, done, until, total)
        if saves:
            run.saver.save(done)
            run.saver.finish()
        run.reporter.close()
        metrics = Path(config.output_dir, "metrics.jsonl")
        lines = metrics.read_text().splitlines() if mesh.is_main else []
        results.append({"losses": [json.loads(line)["loss"] for line in lines], "state": state if mesh.is_main else {}})
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


class StopAfter:
    """A stop flag that is raised so that the loop ends after `until` steps: it is read one step late."""

    def __init__(self, run: Run, until: int) -> None:
        self._step = run.first_step
        self._until = until
        self._total = run.schedule.total_steps

    def __bool__(self) -> bool:
        self._step += 1
        return self._step >= self._until - 1 and self._until < self._total
