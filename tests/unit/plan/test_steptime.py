"""Seconds of a step: what must hold for every cluster."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from bench.models import BUILT_IN
from dsdpo.data.example import Lengths
from dsdpo.plan.memory import gpu_bytes
from dsdpo.plan.setup import Setup
from dsdpo.plan.shape import ModelShape
from dsdpo.plan.steptime import GPUS, Job, compute_flops, draw_lengths, efficiency, predict
from tests.unit.plan.shapes import SHAPE

COUNTS = (1, 2, 8, 16, 64, 512)
BARE = {"base": 0.0, "near_hop": 0.0, "far_hop": 0.0}


@cache
def llama(lora_rank: int) -> ModelShape:
    return ModelShape.from_config(BUILT_IN["llama-2-7b"], lora_rank)


def job(setup: Setup, examples: int = 64, lora_rank: int = 0, **rates: float) -> Job:
    return Job(
        shape=llama(lora_rank),
        setup=setup,
        rates=replace(GPUS["h100"], **rates),
        gpus_per_node=8,
        row_tokens=8192,
        recompute="none",
        lengths=draw_lengths(examples, (512, 256, 256), 0.0),
    )


def test_a_faster_network_takes_its_share_of_the_time() -> None:
    slow, fast = (predict(job(Setup(3), network=n * 25e9, **BARE), 64) for n in (1, 2))
    assert slow.network == pytest.approx(2 * fast.network) and slow.bound == "network"
    assert slow.compute == fast.compute and slow.links == fast.links == 0
    one_node = predict(job(Setup(3)), 8)
    assert one_node.network == 0 and one_node.links > 0 and one_node.crossing == 0


@pytest.mark.parametrize("setup", [Setup(1), Setup(2), Setup(3), Setup(3, hpz=8), Setup(3, live=True)])
def test_more_gpus_train_more_examples_a_second_less_efficiently(setup: Setup) -> None:
    jobs = {gpus: job(setup, examples=8 * gpus) for gpus in COUNTS}
    steps = {gpus: predict(jobs[gpus], gpus) for gpus in COUNTS}
    for end in ("least", "most"):
        speeds = [step.examples / getattr(step, end) for step in steps.values()]
        shares = [efficiency(steps[gpus], predict(jobs[gpus], 1), end) for gpus in COUNTS]
        assert all(a < b for a, b in pairwise(speeds))
        assert shares[0] == 1 and all(b <= a + 1e-3 for a, b in pairwise(shares))
    assert all(step.least <= step.most for step in steps.values())


def test_a_fixed_batch_ends_at_an_example_for_each_gpu() -> None:
    fixed = job(Setup(3), examples=64)
    assert predict(fixed, 64).compute == predict(fixed, 512).compute > 0
    assert predict(fixed, 1).compute == pytest.approx(64 * predict(fixed, 64).compute)


def test_operations() -> None:
    """A forward is 2 N T; recomputing and a live reference add one; LoRA leaves out the gradients of frozen weights."""
    lengths = Lengths.from_table(np.array([[512, 256, 256]]))
    full = job(Setup(3))
    layers = 2 * full.shape.linear * 1024
    attention = 4 * 32 * 4096 * ((512**2 + 2 * 256**2) / 2 + 512 * 512)
    head = 2 * 4096 * 32000 * 512
    flops = compute_flops(full, lengths)
    assert flops == pytest.approx(3 * layers + 3 * attention + 4 * head)
    assert compute_flops(replace(full, recompute="full"), lengths) - flops == pytest.approx(layers + attention)
    live = replace(full, setup=Setup(3, live=True))
    assert compute_flops(live, lengths) - flops == pytest.approx(layers + attention + head)
    lora = compute_flops(job(Setup(3), lora_rank=8), lengths)
    adapters = 6 * llama(8).lora * 1024
    assert flops - lora == pytest.approx(layers + head - adapters)
    assert compute_flops(full, Lengths.from_table(np.array([[0, 768, 768]]))) > flops, (
        "a shared prompt is computed once"
    )


def test_offloading_makes_a_step_longer_and_memory_smaller() -> None:
    plain, offloaded = Setup(3), Setup(3, optimizer="cpu", weights="cpu")
    assert predict(job(offloaded), 8).least > predict(job(plain), 8).least
    assert sum(gpu_bytes(SHAPE, offloaded, 8).values()) < sum(gpu_bytes(SHAPE, plain, 8).values())


def test_examples_may_have_any_number_of_completions() -> None:
    """Three completions behind one prompt take longer than two, and less than three times one."""
    three = replace(job(Setup(3)), lengths=draw_lengths(8, (512, 256, 256, 256), 0.0))
    two, one = (replace(three, lengths=draw_lengths(8, (512, *[256] * k), 0.0)) for k in (2, 1))
    seconds = [predict(each, 8).compute for each in (one, two, three)]
    assert all(a < b for a, b in pairwise(seconds)) and seconds[2] < 3 * seconds[0]
