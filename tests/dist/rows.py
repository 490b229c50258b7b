"""Runs whose first step tells how long rows are, with an allocator's numbers given; runs on every rank of a group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsdpo.config.zero import ZeroConfig
from dsdpo.data.packing import MicroBatch
from dsdpo.engine.engine import start_process_group
from dsdpo.engine.row_tokens import find_rows
from dsdpo.model.packed import ModelOutput
from dsdpo.plan.memory import gradient_bytes, later_gradient_bytes
from dsdpo.plan.shape import ModelShape
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.run import Run
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config, take_steps
from tests.helpers.tiny import ListOfExamples, random_pairs

MEMORY = 10**9


def corrected(folder: str, model: str, stage: int, bytes_of_token: list[int]) -> dict[str, Any]:
    """Train three steps as on two GPUs of `MEMORY` bytes that take so many for a token on each rank; resume the run.

    Returns:
        Bytes of gradients that the engine has before it trains, those that come later, and all, by the formulas; what
        is found on such GPUs; the longest row before and after the first step, (step, tokens) of this rank's
        micro-batches, and what the resumed run begins with.
    """
    mesh = launched()
    assert mesh is not None
    config = run_config(model, Path(folder), stage=stage, max_tokens_per_row=None, save_steps=2, max_steps=4)
    zero = ZeroConfig.load(config)
    hardware = start_process_group(config, zero, mesh)
    pairs = ListOfExamples(random_pairs(17))
    told: dict[str, Any] = {"seen": []}

    def made(steps: int) -> Run:
        run = set_up(config, zero, mesh, hardware, pairs, None, StopFlag(RunDir(Path(config.output_dir))))
        run.schedule = replace(run.schedule, total_steps=steps)
        return run

    run = made(3)
    told["before"] = run.rows.tokens
    buffer = getattr(run.engine.optimizer, "grad_partitions_flat_buffer", None)
    trained = ModelShape.from_module(run.engine.module).trained
    later = later_gradient_bytes(trained, stage, mesh.world_size, run.engine.zero_use_cpu_optimizer())
    told["gradients"] = (0 if buffer is None else buffer.nbytes, later, gradient_bytes(trained, stage, mesh.world_size))
    run.rows.is_estimate = True
    forward = run.forward

    def seen(micro_batch: MicroBatch) -> ModelOutput:
        tokens = len(micro_batch.input_ids) if len(micro_batch.completions) else 0
        told["seen"].append((run.done, tokens))
        return forward(micro_batch)

    def peak(device: torch.device) -> int:
        of_update = MEMORY if any(run.engine.basic_optimizer.state.values()) else 0  # Adam's moments are there
        return bytes_of_token[mesh.rank] * max(tokens for _, tokens in told["seen"]) + later + of_update

    run.forward = seen  # type: ignore[method-assign]
    cuda: Any = torch.cuda
    cuda.reset_peak_memory_stats = cuda.memory_allocated = lambda device: 0
    cuda.mem_get_info = lambda device: (MEMORY >> mesh.rank, MEMORY)  # another process has half of the second GPU
    cuda.max_memory_allocated = peak
    on_gpu = find_rows(config, run.engine, replace(hardware, device=torch.device("cuda")), least=10, mean_step=100)
    told["on_gpu"] = (on_gpu.tokens, on_gpu.recompute, on_gpu.facts, on_gpu.is_estimate)
    take_steps(run)
    run.saver.save(3)
    run.reporter.close()
    told["after"] = run.rows.tokens
    run.engine.destroy()
    again = made(4)
    told["resumed"] = (again.first_step, again.rows.tokens, again.rows.is_estimate)
    again.reporter.close()
    again.engine.destroy()
    torch.distributed.destroy_process_group()
    return told
