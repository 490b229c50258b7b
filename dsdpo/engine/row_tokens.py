"""`max_tokens_per_row` of a run: as given, or what fits the GPU's memory."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine, comm

from dsdpo.config.schema import RunConfig
from dsdpo.engine.engine import Hardware
from dsdpo.plan import memory
from dsdpo.plan.shape import ModelShape


def row_tokens(config: RunConfig, engine: DeepSpeedEngine, hardware: Hardware) -> int:
    """The run's `max_tokens_per_row`, the same on all ranks. A collective call when it is `auto` on CUDA."""
    if config.row_tokens is not None:
        return config.row_tokens
    if hardware.device.type != "cuda":
        return max(memory.CPU_ROW_TOKENS, 2 * config.max_length)
    _, gpu_memory = torch.cuda.mem_get_info(hardware.device)
    fitting = memory.row_tokens(
        ModelShape.from_module(engine.module),
        stage=engine.zero_optimization_stage(),
        gpus=comm.get_world_size(),
        element=hardware.dtype.itemsize,
        checkpointing=config.gradient_checkpointing,
        max_length=config.max_length,
        gpu_memory=gpu_memory,
        allocated=torch.cuda.memory_allocated(hardware.device),
    )
    found = torch.tensor(fitting, device=hardware.device)
    comm.all_reduce(found, op=comm.ReduceOp.MIN)
    return int(found)
