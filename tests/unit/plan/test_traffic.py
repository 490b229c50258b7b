"""Bytes that GPUs send: formulas against hand-made numbers, and what must hold for every cluster."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from dsdpo.plan.setup import Setup
from dsdpo.plan.shape import ModelShape
from dsdpo.plan.traffic import collectives, nvme_bytes, pcie_bytes
from tests.unit.plan.shapes import LORA, SHAPE

COUNTS = (1, 2, 8, 16, 64, 512)


def sent(shape: ModelShape, setup: Setup, gpus: int, micro_steps: int = 1) -> float:
    return sum(c.sent for c in collectives(shape, setup, gpus, micro_steps))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("live", [False, True])
def test_one_gpu_sends_nothing_and_more_send_more(stage: int, live: bool) -> None:
    each = [sent(SHAPE, Setup(stage, live=live), gpus) for gpus in COUNTS]
    assert each[0] == 0 and all(a < b for a, b in pairwise(each))


@pytest.mark.parametrize("gpus", [2, 8, 512])
def test_stage_3_sends_half_as_much_again_as_the_paper_says(gpus: int) -> None:
    """In equal precision; against all-reduced buckets, which are DeepSpeed's default, just as much."""
    three = sent(SHAPE, Setup(3, element=4, reuse=0), gpus)
    assert three / sent(SHAPE, Setup(2, element=4, owner_reduces=True), gpus) == pytest.approx(1.5)
    assert three / sent(SHAPE, Setup(2, element=4), gpus) == pytest.approx(1.0)


def test_each_gpu_receives_all_weights_but_its_own() -> None:
    """Over all GPUs, a gather moves W - 1 copies."""
    gathers = [c for c in collectives(SHAPE, Setup(3, reuse=0), 16, 1) if c.what == "weights"]
    assert sum(c.sent for c in gathers) * 16 == pytest.approx(15 * 2 * 2 * SHAPE.total)


def test_lora_gathers_frozen_weights_and_sends_its_own_gradients() -> None:
    by_name = {c.what: c.bytes for c in collectives(LORA, Setup(3, reuse=0), 8, 1)}
    assert by_name == {"weights": 2 * 2 * LORA.total, "gradients": 4 * LORA.trained}
    assert sent(LORA, Setup(2), 8) < sent(LORA, Setup(3), 8) / 100
    assert sent(LORA, Setup(2, live=True), 8) == sent(LORA, Setup(2), 8), "the adapter is switched off in place"


def test_micro_steps_cost_stage_1_nothing() -> None:
    assert sent(SHAPE, Setup(1), 8, 4) == sent(SHAPE, Setup(1), 8, 1)
    assert sent(SHAPE, Setup(3), 8, 4) == pytest.approx(4 * sent(SHAPE, Setup(3), 8, 1))
    gradients = [c.bytes for m in (1, 4) for c in collectives(SHAPE, Setup(2), 8, m) if c.what == "gradients"]
    assert gradients[1] == 4 * gradients[0]


@pytest.mark.parametrize(("shape", "across"), [(SHAPE, 2 * SHAPE.total), (LORA, 2 * LORA.trained)])
@pytest.mark.parametrize("live", [False, True])
def test_hpz_leaves_one_gather_of_what_was_updated_between_nodes(shape: ModelShape, across: int, live: bool) -> None:
    plain, hpz = (collectives(shape, Setup(3, hpz=n, live=live), 64, 3) for n in (1, 8))
    assert [c.bytes for c in hpz if c.what == "weights" and c.group == 64] == [across]
    assert sum(c.bytes for c in plain) == sum(c.bytes for c in hpz), "the rest stays in the node"
    assert sum(c.calls for c in plain) == sum(c.calls for c in hpz)


def test_offloading_moves_bytes_over_pcie() -> None:
    assert pcie_bytes(SHAPE, Setup(3), 8, 2) == nvme_bytes(SHAPE, Setup(3), 8, 2) == 0
    optimizer = Setup(3, optimizer="cpu", reuse=0)
    share = SHAPE.total / 8
    assert pcie_bytes(SHAPE, optimizer, 8, 1) == (4 + 4 + 2) * share
    assert pcie_bytes(SHAPE, replace(optimizer, weights="cpu"), 8, 1) == (4 + 4 + 2 * 2) * share
    assert nvme_bytes(SHAPE, replace(optimizer, optimizer="nvme"), 8, 3) == 32 * share
