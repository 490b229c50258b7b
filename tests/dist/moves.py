"""Saving, loading and going on in many settings; runs on every rank of a group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from dsdpo.runtime.rundir import RunDir
from dsdpo.engine.zero_state import MOMENTS, STATES
from dsdpo.config.zero import ZeroConfig
from dsdpo.runtime.env import launched
from dsdpo.engine.engine import start_process_group
from dsdpo.train.loop import train
from dsdpo.train.setup import Session, build_session
from dsdpo.runtime.stop import StopFlag
from tests.dist.grid import run_config
from tests.helpers.tiny import ListOfPairs, random_pairs

PAIRS = 21


def state_of(session: Session) -> dict[str, np.ndarray]:
    """`state/parameter` -> what DeepSpeed itself gives for it, whole. A collective call."""
    state: dict[str, np.ndarray] = {}
    optimizer = session.engine.optimizer
    for name, parameter in session.engine.module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if session.engine.zero_optimization():
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
        tasks: changes to `run_config`, and: `folder`, of the run; `until`, the step to stop after (its learning rates are
            those of the whole run); `save`, whether to save then; `state`, whether to return what DeepSpeed holds
            before the first step.

    Returns:
        For each: `losses` of all its steps so far, as its metrics say; `state`.
    """
    mesh = launched()
    assert mesh is not None
    results = []
    for number, task in enumerate(tasks):
        task = dict(task)
        folder, until = Path(task.pop("folder")), task.pop("until")
        saves, looks = task.pop("save", False), task.pop("state", False)
        folder.mkdir(parents=True, exist_ok=True)
        config = run_config(folder=folder, save_steps=None, **task)
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        pairs = ListOfPairs(random_pairs(PAIRS))
        session = build_session(config, zero, mesh, hardware, pairs, None, StopFlag(RunDir(folder)))
        state = state_of(session) if looks else {}
        total = session.schedule.total_steps
        stop = _Stop(session, until)
        session.stop_flag = stop  # type: ignore[assignment]
        done = train(session) if session.first_step < until else session.first_step
        assert done == until, (number, done, until, total)
        if saves:
            session.saver.save(done)
            session.saver.finish()
        session.reporter.close()
        metrics = Path(config.output_dir, "metrics.jsonl")
        lines = metrics.read_text().splitlines() if mesh.is_main else []
        results.append({"losses": [json.loads(line)["loss"] for line in lines], "state": state if mesh.is_main else {}})
        session.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


class _Stop:
    """A stop flag that is raised so that the loop ends after `until` steps: it is read one step late."""

    def __init__(self, session: Session, until: int) -> None:
        self._step = session.first_step
        self._until = until
        self._total = session.schedule.total_steps

    def __bool__(self) -> bool:
        self._step += 1
        return self._step >= self._until - 1 and self._until < self._total
