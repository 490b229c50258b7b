"""Bytes that a training keeps, and the longest micro-batch. That it fits a real GPU is for the GPU tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig, Qwen2Config

from dsdpo.plan.memory import (
    RECOMPUTE,
    USABLE,
    USEFUL_ROW,
    MeasuredStep,
    Recompute,
    activation_bytes_per_token,
    checkpoint_bytes,
    choose_recompute,
    corrected_row,
    free_bytes,
    gpu_bytes,
    gradient_bytes,
    longest_row,
    moments_bytes,
    shorter_row,
    swap_bytes,
    usable_bytes,
)
from dsdpo.plan.setup import Setup
from dsdpo.plan.shape import ModelShape, TensorShape
from tests.unit.plan.shapes import LORA, SHAPE

HEAD = 14 * 8192


def test_activations_of_a_7b_model() -> None:
    """32 layers of h = g = 4096, i = 11008 in bf16."""
    layer = 2 * (14 * 4096 + 4 * 11008) + 8 * 4096
    again = layer + 8 * 4096
    assert activation_bytes_per_token(SHAPE, 2, "none") == 32 * layer + HEAD
    assert activation_bytes_per_token(SHAPE, 2, "selective") == 32 * 2 * (7 * 4096 + 2 * 11008) + again
    assert activation_bytes_per_token(SHAPE, 2, "full") == 32 * 2 * 4096 + again


def test_the_first_that_has_a_useful_row_is_chosen() -> None:
    rows: dict[Recompute, int] = {"none": 4096, "selective": 8192, "full": 16384}
    assert [choose_recompute(rows, useful) for useful in (4096, 4097, 8193, 10**6)] == [
        "none",
        "selective",
        "full",
        "full",
    ]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi3", "gemma3_text", "mistral"])
def test_every_family_has_the_sizes(kind: str) -> None:
    shape = ModelShape.from_tensors(AutoConfig.for_model(kind), [TensorShape("embeddings", (1, 1), True)])
    assert activation_bytes_per_token(shape, 4, "none") > 0


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
    """Less than is usable by the weights, Adam's moments and gradients, and the largest tensor twice."""
    gpu = {"usable": 72 * 10**9, "allocated": 14 * 10**9, "offloads": False}
    largest = 2 * 2 * SHAPE.largest_tensor
    assert free_bytes(SHAPE, 2, 8, 2, **gpu) == 58 * 10**9 - 12 * 7 * 10**9 // 8 - largest
    assert free_bytes(SHAPE, 3, 8, 2, **gpu) == 58 * 10**9 - 8 * 7 * 10**9 // 8 - largest  # has its gradients already
    assert free_bytes(SHAPE, 0, 8, 2, **gpu) == 0
    assert free_bytes(replace(SHAPE, trained=0), 3, 8, 2, **gpu) > free_bytes(SHAPE, 3, 8, 2, **gpu)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_offloaded_takes_no_room_from_rows(stage: int) -> None:
    """A 7B model in full on one GPU: its moments and gradients alone are 84 GB."""
    gpu = {"usable": 22 * 10**9, "allocated": 3 * 10**9, "offloads": True}
    assert free_bytes(SHAPE, stage, 1, 2, **gpu) == 19 * 10**9 - 2 * 2 * SHAPE.largest_tensor
    assert free_bytes(SHAPE, 1, 1, 2, **gpu) == 0  # stage 1 has all gradients on the GPU


def test_memory_of_other_processes_is_not_counted_on() -> None:
    """A context and NCCL's buffers are in the tenth that stays free: rows are then the same from run to run."""
    gpu = 24 * 10**9
    assert usable_bytes(gpu, free=gpu, reserved=0) == 21_600_000_000
    assert usable_bytes(gpu, free=7 * 10**9, reserved=16 * 10**9) == 21_600_000_000
    assert usable_bytes(gpu, free=4 * 10**9, reserved=10 * 10**9) == 13_300_000_000


def test_bytes_on_disks() -> None:
    """Three fp32 numbers of a trained weight in a checkpoint, and its gradient too on NVMe."""
    assert checkpoint_bytes(10**9) == 12 * 10**9 + 2**24
    assert swap_bytes(10**9, gpus=16, gpus_here=8) == 8 * 10**9


def test_a_row_holds_the_longest_example() -> None:
    assert longest_row(10**9, 10**5, 512) == 9984
    assert longest_row(0, 10**5, 700) == 700


@pytest.mark.parametrize(
    ("row", "least", "shorter"),
    [(8192, 700, 4096), (1000, 100, 384), (1000, 700, 700), (700, 700, None), (128, 20, 64), (128, 128, None)],
)
def test_a_row_that_was_too_long_is_halved(row: int, least: int, shorter: int | None) -> None:
    assert shorter_row(row, least) == shorter


def step(tokens: int, activations: int, **changes: int) -> MeasuredStep:
    return MeasuredStep(**{"tokens": tokens, "before": 10**9, "peak": 10**9 + 10**8 + activations} | {
        "after": 2 * 10**9, "gradients": 10**8, "usable": 12 * 10**9} | changes)  # fmt: skip


def test_the_first_step_corrects_the_row() -> None:
    """What is usable, less what is taken after the step and the next gradients, by what a token has taken."""
    assert corrected_row([step(1000, 10**8)], 512) == 9900 * 10**6 // 10**5 // 128 * 128
    assert corrected_row([step(1000, 2 * 10**8)], 512) == 9900 * 10**6 // (2 * 10**5) // 128 * 128
    assert corrected_row([step(1000, 10**8, after=11 * 10**9, usable=10**9)], 512) == 512


def test_ranks_agree_on_the_shortest_and_those_without_examples_do_not_count() -> None:
    ranks = [step(1000, 10**8), step(990, 2 * 10**8), step(0, 10**8), step(20, 10**8)]
    assert corrected_row(ranks, 512) == corrected_row([ranks[1]], 512)
    assert corrected_row([step(0, 10**8), step(0, 0)], 512) is None
    assert corrected_row([step(1000, -1)], 512) is None


TEST_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip


def test_the_run_config_of_the_readme_fits_the_gpu_that_it_names() -> None:
    """Qwen2.5-7B with LoRA of rank 16 and pairs of 2048 on one GPU of 24 GB, of which a tenth stays free."""
    shape = ModelShape.from_config(TEST_7B, 16)
    held = sum(gpu_bytes(shape, Setup(1), 1).values())
    free = int(24 * 2**30 * USABLE - held)
    rows = {one: longest_row(free, activation_bytes_per_token(shape, 2, one), 0) for one in RECOMPUTE}
    assert choose_recompute(rows, USEFUL_ROW) == "full" and rows["full"] >= 8192
    ample = int(80 * 2**30 * USABLE - held)
    assert longest_row(ample, activation_bytes_per_token(shape, 2, "none"), 0) >= 4096
