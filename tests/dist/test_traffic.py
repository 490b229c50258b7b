"""dsdpo/plan/traffic.py says what dsdpo sends: held against the collectives of real ranks, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest

from dsdpo.plan.setup import Setup
from dsdpo.plan.shape import ModelShape
from dsdpo.plan.traffic import collectives
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

WORLD = 2
SMALL = 200  # bytes of norms, metrics, flags and padding
RELEASE_AT_ONCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
ZERO: dict[int, dict[str, Any]] = {
    0: {"stage": 0},
    1: {"stage": 1},
    2: {"stage": 2},
    3: {"stage": 3, **RELEASE_AT_ONCE},
}
SEVERAL = {"max_tokens_per_row": 128}
CASES: dict[str, tuple[Setup, dict[str, Any]]] = {
    "0 in fp32": (Setup(0, element=4), {"precision": "fp32"}),
    "1": (Setup(1), SEVERAL),
    "2": (Setup(2), SEVERAL),
    "2 in fp32": (Setup(2, element=4), {"precision": "fp32"}),
    "2, owner reduces": (Setup(2, owner_reduces=True), {}),
    "2, LoRA": (Setup(2), {"finetuning_type": "lora"}),
    "3": (Setup(3, reuse=0), SEVERAL),
    "3, recomputing": (Setup(3, reuse=0), {"gradient_checkpointing": True}),
    "3, live": (Setup(3, reuse=0, live=True), SEVERAL | {"reference": "live"}),
    "3, LoRA": (Setup(3, reuse=0), {"finetuning_type": "lora"}),
    "3, LoRA, live": (Setup(3, live=True), {"finetuning_type": "lora", "reference": "live"}),
    "3, 4 bits": (Setup(3, reuse=0, bits=4), SEVERAL | {"finetuning_type": "lora", "quantization_bit": 4}),
    "3, kept": (Setup(3), {}),
}


def block(setup: Setup) -> dict[str, Any]:
    """The zero_optimization block of a setup."""
    changes: dict[str, Any] = {"use_multi_rank_bucket_allreduce": False} if setup.owner_reduces else {}
    if setup.stage == 3 and setup.reuse:
        changes = {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": setup.reuse}
    return {**ZERO[setup.stage], **changes}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelShape, int, dict[str, int]]]:
    folder = tmp_path_factory.mktemp("traffic")
    save_model(folder / "model", tiny_llama_config(tied=False))
    save_tokenizer(folder / "model")
    shared = {"model": str(folder / "model"), "cache_dir": str(folder / "cache"), "gradient_checkpointing": False}
    cases = [{**shared, "zero": block(setup), **changes} for setup, changes in CASES.values()]
    return dict(zip(CASES, run_ranks("tests.dist.traffic:count", WORLD, cases)[0]))


@pytest.mark.parametrize("name", CASES)
def test_the_model_counts_what_is_sent(counted: dict[str, tuple[ModelShape, int, dict[str, int]]], name: str) -> None:
    shape, micro_steps, sent = counted[name]
    setup, changes = CASES[name]
    assert (micro_steps > 1) == ("max_tokens_per_row" in changes), "several micro-steps are counted too"
    told = collectives(shape, setup, WORLD, micro_steps)
    around = {1: ("all_gather_into_tensor", "reduce_scatter_tensor", "reduce"), 2: ("all_reduce",)}
    for ring, functions in around.items():
        expected = sum(c.bytes for c in told if c.ring == ring)
        assert abs(sum(sent.get(f, 0) for f in functions) - expected) <= SMALL * micro_steps
