"""Counts what the ranks of a training send to each other; runs on every rank of a group."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.engine import start_process_group
from dsdpo.plan.shape import ModelShape
from dsdpo.runtime.env import launched
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.run import Run
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config, take_steps
from tests.helpers.tiny import ListOfExamples, random_pairs

# function of torch.distributed -> place and name of the argument that holds all that is gathered or reduced
_WHOLE = {
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
}


def count(cases: list[dict[str, Any]]) -> list[tuple[ModelShape, int, dict[str, int]]]:
    """Train each case (changes to `run_config`; `zero`, a zero_optimization block) for a few steps.

    Returns, for each case: the model's shape, micro-steps of a step, and in its last step the bytes gathered or
    reduced by each function of torch.distributed.
    """
    mesh = launched()
    assert mesh is not None
    sent: Counter[str] = Counter()
    for name, (place, argument) in _WHOLE.items():
        setattr(torch.distributed, name, _counted(getattr(torch.distributed, name), name, place, argument, sent))
    steps: list[dict[str, int]] = []
    end_step = Run.end_step

    def counted_end(run: Run, *args: Any) -> bool:
        stops = end_step(run, *args)
        steps.append(dict(sent))
        sent.clear()
        return stops

    Run.end_step = counted_end  # type: ignore[method-assign]
    results = []
    for case in cases:
        changes = dict(case)
        folder = Path(tempfile.mkdtemp())
        write_atomically(folder / "zero.json", json.dumps({"zero_optimization": changes.pop("zero")}))
        options: dict[str, Any] = {"save_steps": None, "precision": "bf16", **changes}
        config = run_config(folder=folder, **options).model_copy(update={"deepspeed": str(folder / "zero.json")})
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        stop = StopFlag(RunDir(folder))
        run = set_up(config, zero, mesh, hardware, ListOfExamples(random_pairs(40)), None, stop)
        shape = ModelShape.from_module(run.engine.module)
        (*_, batch) = run.loader.training_batches(range(5), config.train_batch_size, config.seed)
        sent.clear()
        take_steps(run)
        results.append((shape, len(batch.micro_batches), steps[-1]))
        run.reporter.close()
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def _counted(
    collective: Callable[..., Any], name: str, place: int, argument: str, sent: Counter[str]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        whole = kwargs[argument] if argument in kwargs else args[place]
        sent[name] += whole.nbytes
        return collective(*args, **kwargs)

    return call
