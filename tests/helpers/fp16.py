"""Runs in fp16 whose gradients overflow; on every rank of a group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.engine import start_process_group
from dsdpo.engine.zero_state import adam_step, local_shards
from dsdpo.errors import ConfigError, NumericError
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.run import Run
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config, take_steps
from tests.dist.moves import StopAfter
from tests.helpers.objectives import examples_for
from tests.helpers.tiny import ListOfExamples, random_pairs

PAIRS = 21


def go(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several stretches of runs, one after another in one process group.

    Args:
        tasks: changes to `run_config`, and: `objective`, a stage, dpo by default; `folder`, of the run; `stage` and
            `scale`, the ZeRO stage and the block `fp16` of the DeepSpeed JSON, `offload`, `persist`; `until`, the step
            to stop after; `save`, `export`, whether to do so then.

    Returns:
        For each: `lines` of metrics.jsonl; `state`, what this rank holds at the end; `scale`, where this rank began and
        ended; `steps`, those that Adam and DeepSpeed have counted; `error`, what ended it.
    """
    mesh = launched()
    assert mesh is not None
    results = []
    for number, task in enumerate(tasks):
        task = dict(task)
        folder, until, objective = Path(task.pop("folder")), task.pop("until"), task.pop("objective", "dpo")
        stage, scale, saves = task.pop("stage"), task.pop("scale", {}), task.pop("save", False)
        exports = task.pop("export", False)
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3 and not task.pop("persist", False):
            zero["stage3_param_persistence_threshold"] = 0
        if task.pop("offload", False):
            zero["offload_optimizer"] = {"device": "cpu"}
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"precision": "fp16", "save_steps": None, **task}
        deepspeed = json.dumps({"zero_optimization": zero, "fp16": scale})
        config = run_config(folder=folder, **{**settings, "deepspeed": deepspeed})
        config = config.model_copy(update={"stage": objective})
        parsed = ZeroConfig.load(config)
        hardware = start_process_group(config, parsed, mesh)
        source = ListOfExamples(random_pairs(PAIRS)) if objective == "dpo" else examples_for(objective, PAIRS)
        run = set_up(config, parsed, mesh, hardware, source, None, StopFlag(RunDir(folder)))
        began = run.scaling.state
        run.stop_flag = StopAfter(run, until)  # type: ignore[assignment]
        error = ""
        try:
            done = take_steps(run)
            assert done == until, (number, done, until)
        except NumericError as found:
            error = str(found)
        if exports:
            run.export()
        if saves:
            run.saver.save(until)
            run.saver.finish()
        run.reporter.close()
        lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines() if mesh.is_main else []
        results.append(
            {
                "lines": [json.loads(line) for line in lines],
                "state": {} if error else held_by(run),
                "scale": (began, run.scaling.state),
                "steps": (adam_step(run.engine), run.engine.global_steps),
                "error": error,
            }
        )
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def held_by(run: Run) -> dict[str, np.ndarray]:
    """`state/parameter` -> this rank's piece of it."""
    pieces = local_shards(run.engine)
    return {f"{key}/{p.name}": x.numpy().copy() for p in pieces for key, x in p.states.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """To the bit."""
    assert found.keys() == expected.keys() and found
    different = [key for key in expected if not np.array_equal(found[key], expected[key])]
    assert not different, f"{len(different)} of {len(expected)} differ, such as {different[0]}"


def refused(task: dict[str, Any]) -> list[str]:
    """Codes of the problems that keep a rank from beginning."""
    try:
        go([task])
    except ConfigError as error:
        return [problem.code for problem in error.problems]
    return []
