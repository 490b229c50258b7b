"""LoRA runs that compute adapters as one operation, or as PEFT does; runs on every rank of a group."""

from __future__ import annotations

from typing import Any

import torch

from dsdpo.engine import engine
from dsdpo.model import lora
from tests.dist.grid import run_cases


def run(cases: list[dict[str, Any]], n_pairs: int, fused: bool) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """`run_cases`, and how often the operation computed for how many layers at once."""
    calls: dict[int, int] = {}
    compute = lora._compute

    def count(parts: Any, inputs: torch.Tensor) -> Any:
        calls[len(parts)] = calls.get(len(parts), 0) + 1
        return compute(parts, inputs)

    lora._compute = count
    engine.uses_fused_lora = lambda config: fused
    return run_cases(cases, n_pairs), calls
