"""What ZeRO-3 leaves whole between layers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dsdpo.engine.engine import keep_whole

THRESHOLD = "stage3_param_persistence_threshold"


def model(rank: int) -> nn.Module:
    """A frozen matrix of 1.44M elements and an adapter beside it."""
    layer = nn.Module()
    layer.base_layer = nn.Linear(1200, 1200, bias=False, device="meta")
    layer.lora_A = nn.Linear(1200, rank, bias=False, device="meta")
    layer.lora_B = nn.Linear(rank, 1200, bias=False, device="meta")
    return nn.ModuleDict({"layer": layer})


@pytest.mark.parametrize(
    ("rank", "ranks", "block", "threshold"),
    [
        (8, 1, {}, 1200 * 1200 + 2 * 8 * 1200),  # everything
        (8, 2, {}, 100_000),  # DeepSpeed's own is more than the adapter needs
        (128, 2, {}, 128 * 1200),  # the adapter, and not the matrix
        (128, 1, {THRESHOLD: 5}, 5),  # the user's word
        (128, 1, {"offload_param": {"device": "cpu"}}, None),  # whole would be a copy on the GPU
        (128, 1, {"offload_param": {"device": "none"}}, 1200 * 1200 + 2 * 128 * 1200),
    ],
)
def test_the_threshold(rank: int, ranks: int, block: dict[str, Any], threshold: int | None) -> None:
    keep_whole(block, model(rank), ranks)
    assert block.get(THRESHOLD) == threshold
