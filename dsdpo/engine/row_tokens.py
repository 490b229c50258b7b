"""How long packed rows are, and what of a layer is computed again: as given, or what fits the GPU's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine, comm

from dsdpo.config.schema import RunConfig
from dsdpo.data.packing import MicroBatch
from dsdpo.engine.engine import Hardware
from dsdpo.plan import memory
from dsdpo.plan.shape import ModelShape
from dsdpo.runtime.collectives import all_gather_object


@dataclass
class Rows:
    """The run's rows, the same on all ranks.

    Attributes:
        tokens: of the longest one.
        recompute: `gradient_checkpointing`, decided.
        least: tokens of the longest example.
        found: whether `tokens` comes from the GPU's memory, and not from the run config.
        facts: what it then depends on, beside the number of ranks.
        is_estimate: whether the first step is to correct it.
        remark: how `recompute` was decided; empty where the run config says it.
    """

    tokens: int
    recompute: memory.Recompute
    least: int
    found: bool
    facts: dict[str, Any]
    is_estimate: bool = False
    remark: str = ""

    def shorter(self) -> int | None:
        """What another attempt may try where memory is full; None where the longest example takes as much."""
        return memory.shorter_row(self.tokens, self.least)

    def __str__(self) -> str:
        return f"micro-batches of at most {self.tokens} tokens"


def find_rows(config: RunConfig, engine: DeepSpeedEngine, hardware: Hardware, least: int, mean_step: int) -> Rows:
    """The rows of a run whose model, and live reference, are loaded. A collective call on CUDA.

    Args:
        least: tokens of the longest example.
        mean_step: tokens of a step that fall to a rank, on average: a row need not be longer to be useful.
    """
    given, asked = config.max_tokens_per_row, config.gradient_checkpointing
    facts: dict[str, Any] = {"reference": config.reference_kind}
    if hardware.device.type != "cuda":
        # `auto` is 8192 there
        tokens = config.row_tokens or max(memory.CPU_ROW_TOKENS, 2 * config.max_length, least)
        recompute = "none" if asked == "auto" else asked
        found = not isinstance(given, int)
        return Rows(tokens, recompute, least, found, {**facts, "gradient_checkpointing": recompute})
    shape, element = ModelShape.from_module(engine.module), hardware.dtype.itemsize
    gpu_memory = torch.cuda.mem_get_info(hardware.device)[1]
    stage, offloads = engine.zero_optimization_stage(), engine.zero_use_cpu_optimizer()
    free = memory.free_bytes(
        shape,
        stage=stage,
        gpus=comm.get_world_size(),
        element=element,
        usable=_usable(hardware.device),
        allocated=torch.cuda.memory_allocated(hardware.device),
        offloads=offloads,
    )
    free, gpu_memory = (min(values) for values in zip(*all_gather_object((free, gpu_memory))))
    row = {
        one: memory.longest_row(free, memory.activation_bytes_per_token(shape, element, one), least)
        for one in memory.RECOMPUTE
    }
    useful = given if isinstance(given, int) else max(least, min(memory.USEFUL_ROW, mean_step))
    recompute = memory.choose_recompute(row, useful) if asked == "auto" else asked
    lengths = ", ".join(f"{tokens} with {one}" for one, tokens in row.items())
    remark = f"gradient_checkpointing: {recompute}; by the formula, rows fit of {lengths} (a useful one has {useful})"
    found = not isinstance(given, int)
    facts |= {"gradient_checkpointing": recompute, "gpu_memory": gpu_memory, "zero_stage": stage, "offloads": offloads}
    tokens = row[recompute] if found else int(given or 0)
    return Rows(tokens, recompute, least, found, facts, is_estimate=found, remark=remark if asked == "auto" else "")


def row_without_gradients(config: RunConfig, least: int) -> int:
    """Tokens of an evaluation's longest row, which takes little memory. least: tokens of the longest example."""
    return config.row_tokens or max(4 * config.max_length, least)


def _usable(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return memory.usable_bytes(total, free, torch.cuda.memory_reserved(device))


class FirstStep:
    """What the allocator says of the first step on a GPU: made before it, and asked after it.

    The allocator's peak counts from here on.
    """

    def __init__(self, engine: DeepSpeedEngine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)
        self._peak: int | None = None
        # the update takes memory of its own, when activations are gone: look before it
        self._hook = engine.basic_optimizer.register_step_pre_hook(self._at_update)

    def _at_update(self, *_: Any) -> None:
        if self._peak is None:
            self._peak = torch.cuda.max_memory_allocated(self._device)

    def correct(self, rows: Rows, micro_batches: Iterable[MicroBatch]) -> str:
        """Set the longest row to what the step's memory allows, the same on all ranks. A collective call.

        Args:
            micro_batches: of this rank.

        Returns:
            What has changed, in words; empty where nothing has.
        """
        self._hook.remove()
        device, stage = self._device, self._engine.zero_optimization_stage()
        trained = ModelShape.from_module(self._engine.module).trained
        measured = memory.MeasuredStep(
            tokens=max((len(one.input_ids) for one in micro_batches if len(one.completions)), default=0),
            before=self._before,
            peak=torch.cuda.max_memory_allocated(device) if self._peak is None else self._peak,
            after=torch.cuda.memory_allocated(device),
            gradients=memory.later_gradient_bytes(
                trained, stage, comm.get_world_size(), self._engine.zero_use_cpu_optimizer()
            ),
            usable=_usable(device),
        )
        before, found = rows.tokens, memory.corrected_row(all_gather_object(measured), rows.least)
        if found is None:
            return ""
        rows.tokens = found
        return f"rows of at most {found} tokens, by the memory that the first step took, instead of {before}"
