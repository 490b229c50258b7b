"""Bytes that a training keeps, and the longest micro-batch. That it fits a real GPU is for the GPU tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from dsdpo.plan.memory import (
    activation_bytes_per_token,
    checkpoint_bytes,
    gpu_bytes,
    gradient_bytes,
    longest_row,
    moments_bytes,
    row_tokens,
    swap_bytes,
)
from dsdpo.plan.setup import Setup
from dsdpo.plan.shape import ModelShape, TensorShape
from tests.unit.plan.shapes import LORA, SHAPE


def test_activations_of_a_7b_model() -> None:
    """32 layers of h = g = 4096, i = 11008 in bf16: 32 (2 (14 h + 4 i) + 8 h) bytes."""
    assert activation_bytes_per_token(SHAPE, 2, False) == 32 * (2 * (14 * 4096 + 4 * 11008) + 8 * 4096)
    recomputed = activation_bytes_per_token(SHAPE, 2, True)
    assert recomputed < activation_bytes_per_token(SHAPE, 2, False) / 15


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi3", "gemma3_text", "mistral"])
def test_every_family_has_the_sizes(kind: str) -> None:
    shape = ModelShape.from_tensors(AutoConfig.for_model(kind), [TensorShape("embeddings", (1, 1), True)])
    assert activation_bytes_per_token(shape, 4, False) > 0


def test_zero_shards_what_it_shards() -> None:
    assert [moments_bytes(100, stage, 4) + gradient_bytes(100, stage, 4) for stage in range(4)] == [1200, 600, 300, 300]


@pytest.mark.parametrize("stage", range(4))
def test_memory_is_shared_out_as_the_stage_says(stage: int) -> None:
    parts = gpu_bytes(SHAPE, Setup(stage), 8)
    assert parts["Adam's moments"] == 8 * SHAPE.trained / (8 if stage >= 1 else 1)
    assert parts["gradients"] == 4 * SHAPE.trained / (8 if stage >= 2 else 1)
    assert parts["weights"] == 2 * SHAPE.total / (8 if stage == 3 else 1)
    assert gpu_bytes(SHAPE, Setup(stage, live=True), 8)["reference"] == 2 * SHAPE.total / 8
    assert "reference" not in gpu_bytes(LORA, Setup(stage, live=True), 8)


def test_quantized_weights_take_their_bits_and_a_scale_for_64() -> None:
    """Under ZeRO-3 the packed values are shared out and the scales are not; what is no linear map stays in 16 bits."""
    packed, rest = LORA.linear / 2, 2 * (LORA.total - LORA.linear)
    one, eight = gpu_bytes(LORA, Setup(1, bits=4), 8), gpu_bytes(LORA, Setup(3, bits=4), 8)
    assert one["weights"] == packed + rest == 8 * eight["weights"]
    assert one["scales of quantized weights"] == eight["scales of quantized weights"]
    assert one["scales of quantized weights"] == pytest.approx(LORA.linear * 0.127 / 8, rel=1e-3)
    assert gpu_bytes(LORA, Setup(1, bits=8), 8)["weights"] == LORA.linear + rest
    assert eight["gathered"] < gpu_bytes(LORA, Setup(3), 8)["gathered"] / 2


def test_a_row_takes_what_training_leaves() -> None:
    """Of 80 GB: 90 %, less the weights, Adam's moments and gradients, and the largest tensor twice."""
    free = 72 * 10**9 - 14 * 10**9 - 12 * 7 * 10**9 // 8 - 2 * 2 * SHAPE.largest_tensor
    told = row_tokens(SHAPE, 3, 8, 2, False, 512, gpu_memory=80 * 10**9, allocated=14 * 10**9)
    assert told == longest_row(free, activation_bytes_per_token(SHAPE, 2, False), 512) > 1024
    assert row_tokens(SHAPE, 0, 8, 2, False, 512, gpu_memory=80 * 10**9, allocated=14 * 10**9) == 1024
    frozen = replace(SHAPE, trained=0)
    assert row_tokens(frozen, 3, 8, 2, False, 512, gpu_memory=80 * 10**9, allocated=14 * 10**9) > told


def test_bytes_on_disks() -> None:
    """Three fp32 numbers of a trained weight in a checkpoint, and its gradient too on NVMe."""
    assert checkpoint_bytes(10**9) == 12 * 10**9 + 2**24
    assert swap_bytes(10**9, gpus=16, gpus_here=8) == 8 * 10**9


def test_a_row_holds_at_least_one_pair() -> None:
    assert longest_row(10**9, 10**5, 512) == 9984
    assert longest_row(0, 10**5, 512) == 1024
