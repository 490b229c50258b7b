"""A GPU that has no memory left ends the run with a message about what to lower, and with an exit code of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import IOFailure, OutOfMemory
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.row_limit import write_row_limit
from dsdpo.runtime.rundir import RunDir

# What libraries raise as a plain RuntimeError: cuBLAS and cuDNN for their workspaces, NCCL for its buffers.
_OF_LIBRARIES = re.compile(
    r"(cuda|hip) (error: )?out of memory|(cublas|cudnn|hipblas|cusolver)\w*_alloc_failed|nccl.*out of memory",
    re.IGNORECASE | re.DOTALL,
)


@dataclass
class Memory:
    """What is known of a run whose GPU is full.

    Attributes:
        row_tokens: gives the longest packed row, in tokens; None until it is known.
        recompute: gives `gradient_checkpointing`, decided where that is known.
        shorter_row: gives what another attempt may try; None where nothing shorter helps.
    """

    row_tokens: Callable[[], int | None]
    recompute: Callable[[], str]
    shorter_row: Callable[[], int | None] = lambda: None


@contextmanager
def out_of_memory_told(config: RunConfig, zero: ZeroConfig, mesh: Mesh) -> Iterator[Memory]:
    """Turn what torch and its libraries raise when a GPU is full into OutOfMemory; record a shorter row in output_dir
    where another attempt may take it.

    Yields:
        What the body fills in as it learns it.

    Raises:
        OutOfMemory: with the row length, and what to lower.
    """
    memory = Memory(lambda: config.row_tokens, lambda: config.gradient_checkpointing)
    try:
        yield memory
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row, shorter = memory.row_tokens(), memory.shorter_row()
        text = message(error, config, zero, mesh, row, memory.recompute())
        if row is not None and shorter is not None:
            run_dir = RunDir(Path(config.output_dir))
            with suppress(IOFailure):
                write_row_limit(run_dir, shorter, row)
                text += f". The next start takes rows of at most {shorter} tokens, as {run_dir.row_limit} says"
        raise OutOfMemory(text) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _OF_LIBRARIES.search(str(error)) is not None
    )


def message(
    error: BaseException, config: RunConfig, zero: ZeroConfig, mesh: Mesh, row_tokens: int | None, recompute: str
) -> str:
    """What happened, the settings that decide how much memory a rank takes, and what to change, the cheapest first."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    row = "not known yet" if row_tokens is None else f"{row_tokens} tokens"
    least = 2 * config.max_length
    remedies = []
    if row_tokens is None or row_tokens > least:
        remedies.append(f"lower max_tokens_per_row (at least 2 * max_length = {least}; it changes no result)")
    if recompute != "full":
        remedies.append("set gradient_checkpointing: full")
    if zero.stage < 3 and (mesh.world_size > 1 or zero.stage == 0):
        remedies.append("use a higher ZeRO stage (deepspeed: zero3)")
    if zero.offload_optimizer == "none" and config.finetuning_type == "full":
        remedies.append("offload the optimizer (deepspeed: zero3_offload)")
    remedies.append("lower max_length, and max_tokens_per_row with it")
    return (
        f"rank {mesh.rank} has no GPU memory left: {said[:400]} The longest packed row is {row} (max_tokens_per_row), "
        f"max_length is {config.max_length}, the ZeRO stage is {zero.stage}. To need less, in this order: "
        f"{'; '.join(remedies)}"
    )
