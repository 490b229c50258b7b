"""The scaling model: formulae against hand-made numbers, and what must hold for every cluster."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.models import BUILT_IN, Model, load_model, measure
from bench.steptime import GPUS, Job, compute_flops, draw_lengths, efficiency, predict
from bench.traffic import Setup, Sizes, collectives, memory, nvme_bytes, pcie_bytes
from dsdpo.plan.memory import optimizer_bytes
from tests.helpers.tiny import tiny_llama_config

ROOT = Path(__file__).parents[2]
SIZES = Sizes(total=7 * 10**9, trained=7 * 10**9, largest=2 * 10**8, modules=34)
LORA = replace(SIZES, trained=2 * 10**7)
COUNTS = (1, 2, 8, 16, 64, 512)
BARE = {"base": 0.0, "near_hop": 0.0, "far_hop": 0.0}


@pytest.fixture(scope="module")
def llama() -> Model:
    return load_model("llama-2-7b")


def job(model: Model, setup: Setup, pairs: int = 64, lora_rank: int = 0, **rates: float) -> Job:
    return Job(
        shape=model.shape(lora_rank),
        sizes=model.sizes(lora_rank),
        setup=setup,
        rates=replace(GPUS["h100"], **rates),
        gpus_per_node=8,
        row_tokens=8192,
        checkpointing=False,
        lengths=draw_lengths(pairs, (512, 256, 256), 0.0),
    )


def sent(sizes: Sizes, setup: Setup, gpus: int, micro_steps: int = 1) -> float:
    return sum(c.sent for c in collectives(sizes, setup, gpus, micro_steps))


def test_sizes_are_those_of_the_published_models(llama: Model) -> None:
    assert llama.total == 6_738_415_616
    assert measure(BUILT_IN["llama-2-70b"]).total == 68_976_648_192
    assert llama.sizes(8).trained == 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert llama.sizes(0).trained == llama.total and llama.largest == 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096


def test_a_folder_is_read(tmp_path: Path) -> None:
    tiny_llama_config().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.hidden_size == 32
    with pytest.raises(SystemExit, match="no folder"):
        load_model(str(tmp_path / "other"))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("live", [False, True])
def test_one_gpu_sends_nothing_and_more_send_more(stage: int, live: bool) -> None:
    each = [sent(SIZES, Setup(stage, live=live), gpus) for gpus in COUNTS]
    assert each[0] == 0 and all(a < b for a, b in pairwise(each))


@pytest.mark.parametrize("gpus", [2, 8, 512])
def test_stage_3_sends_half_as_much_again_as_the_paper_says(gpus: int) -> None:
    """In equal precision; against all-reduced buckets, which are DeepSpeed's default, just as much."""
    three = sent(SIZES, Setup(3, element=4, reuse=0), gpus)
    assert three / sent(SIZES, Setup(2, element=4, owner_reduces=True), gpus) == pytest.approx(1.5)
    assert three / sent(SIZES, Setup(2, element=4), gpus) == pytest.approx(1.0)


def test_each_gpu_receives_all_weights_but_its_own() -> None:
    """Over all GPUs, a gather moves W - 1 copies."""
    gathers = [c for c in collectives(SIZES, Setup(3, reuse=0), 16, 1) if c.what == "weights"]
    assert sum(c.sent for c in gathers) * 16 == pytest.approx(15 * 2 * 2 * SIZES.total)


def test_lora_gathers_frozen_weights_and_sends_its_own_gradients() -> None:
    by_name = {c.what: c.bytes for c in collectives(LORA, Setup(3, reuse=0), 8, 1)}
    assert by_name == {"weights": 2 * 2 * LORA.total, "gradients": 4 * LORA.trained}
    assert sent(LORA, Setup(2), 8) < sent(LORA, Setup(3), 8) / 100
    assert sent(LORA, Setup(2, live=True), 8) == sent(LORA, Setup(2), 8), "the adapter is switched off in place"


def test_micro_steps_cost_stage_1_nothing() -> None:
    assert sent(SIZES, Setup(1), 8, 4) == sent(SIZES, Setup(1), 8, 1)
    assert sent(SIZES, Setup(3), 8, 4) == pytest.approx(4 * sent(SIZES, Setup(3), 8, 1))
    gradients = [c.bytes for m in (1, 4) for c in collectives(SIZES, Setup(2), 8, m) if c.what == "gradients"]
    assert gradients[1] == 4 * gradients[0]


@pytest.mark.parametrize(("sizes", "across"), [(SIZES, 2 * SIZES.total), (LORA, 2 * LORA.trained)])
@pytest.mark.parametrize("live", [False, True])
def test_hpz_leaves_one_gather_of_what_was_updated_between_nodes(sizes: Sizes, across: int, live: bool) -> None:
    plain, hpz = (collectives(sizes, Setup(3, hpz=n, live=live), 64, 3) for n in (1, 8))
    assert [c.bytes for c in hpz if c.what == "weights" and c.group == 64] == [across]
    assert sum(c.bytes for c in plain) == sum(c.bytes for c in hpz), "the rest stays in the node"
    assert sum(c.calls for c in plain) == sum(c.calls for c in hpz)


def test_a_faster_network_takes_its_share_of_the_time(llama: Model) -> None:
    slow, fast = (predict(job(llama, Setup(3), network=n * 25e9, **BARE), 64) for n in (1, 2))
    assert slow.network == pytest.approx(2 * fast.network) and slow.bound == "network"
    assert slow.compute == fast.compute and slow.links == fast.links == 0
    one_node = predict(job(llama, Setup(3)), 8)
    assert one_node.network == 0 and one_node.links > 0 and one_node.crossing == 0


@pytest.mark.parametrize("setup", [Setup(1), Setup(2), Setup(3), Setup(3, hpz=8), Setup(3, live=True)])
def test_more_gpus_train_more_pairs_a_second_less_efficiently(llama: Model, setup: Setup) -> None:
    jobs = {gpus: job(llama, setup, pairs=8 * gpus) for gpus in COUNTS}
    steps = {gpus: predict(jobs[gpus], gpus) for gpus in COUNTS}
    for end in ("least", "most"):
        speeds = [step.pairs / getattr(step, end) for step in steps.values()]
        shares = [efficiency(steps[gpus], predict(jobs[gpus], 1), end) for gpus in COUNTS]
        assert all(a < b for a, b in pairwise(speeds))
        assert shares[0] == 1 and all(b <= a + 1e-3 for a, b in pairwise(shares))
    assert all(step.least <= step.most for step in steps.values())


def test_a_fixed_batch_ends_at_a_pair_for_each_gpu(llama: Model) -> None:
    fixed = job(llama, Setup(3), pairs=64)
    assert predict(fixed, 64).compute == predict(fixed, 512).compute > 0
    assert predict(fixed, 1).compute == pytest.approx(64 * predict(fixed, 64).compute)


def test_operations(llama: Model) -> None:
    """A forward is 2 N T; recomputing and a live reference add one; LoRA leaves out the gradients of frozen weights."""
    lengths = np.array([[512, 256, 256]])
    full = job(llama, Setup(3))
    layers = 2 * full.shape.linear * 1024
    attention = 4 * 32 * 4096 * ((512**2 + 2 * 256**2) / 2 + 512 * 512)
    head = 2 * 4096 * 32000 * 512
    flops = compute_flops(full, lengths)
    assert flops == pytest.approx(3 * layers + 3 * attention + 4 * head)
    assert compute_flops(replace(full, checkpointing=True), lengths) - flops == pytest.approx(layers + attention)
    live = replace(full, setup=Setup(3, live=True))
    assert compute_flops(live, lengths) - flops == pytest.approx(layers + attention + head)
    lora = compute_flops(job(llama, Setup(3), lora_rank=8), lengths)
    adapters = 6 * llama.shape(8).lora * 1024
    assert flops - lora == pytest.approx(layers + head - adapters)
    assert compute_flops(full, np.array([[0, 768, 768]])) > flops, "a shared prompt is computed once"


def test_offloading_moves_bytes_over_pcie() -> None:
    assert pcie_bytes(SIZES, Setup(3), 8, 2) == nvme_bytes(SIZES, Setup(3), 8, 2) == 0
    optimizer = Setup(3, optimizer="cpu", reuse=0)
    share = SIZES.total / 8
    assert pcie_bytes(SIZES, optimizer, 8, 1) == (4 + 4 + 2) * share
    assert pcie_bytes(SIZES, replace(optimizer, weights="cpu"), 8, 1) == (4 + 4 + 2 * 2) * share
    assert nvme_bytes(SIZES, replace(optimizer, optimizer="nvme"), 8, 3) == 32 * share


def test_offloading_makes_a_step_longer_and_memory_smaller(llama: Model) -> None:
    plain, offloaded = Setup(3), Setup(3, optimizer="cpu", weights="cpu")
    assert predict(job(llama, offloaded), 8).least > predict(job(llama, plain), 8).least
    assert sum(memory(SIZES, offloaded, 8).values()) < sum(memory(SIZES, plain, 8).values())


@pytest.mark.parametrize("stage", range(4))
def test_memory_is_shared_out_as_the_stage_says(stage: int) -> None:
    parts = memory(SIZES, Setup(stage), 8)
    assert parts["Adam's moments"] + parts["gradients"] == optimizer_bytes(SIZES.trained, stage, 8)
    assert parts["weights"] == 2 * SIZES.total / (8 if stage == 3 else 1)
    assert memory(SIZES, Setup(stage, live=True), 8)["reference"] == 2 * SIZES.total / 8
    assert "reference" not in memory(LORA, Setup(stage, live=True), 8)


def test_what_it_prints() -> None:
    line = [sys.executable, "bench/scaling.py", "llama-2-7b", "--gpus", "8,64"]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [row.split()[0] for row in told[2:4]] == ["8", "64"]
    assert "nothing is measured" in told[4] and "assumed" in told[5]
    held = subprocess.run([*line, "--memory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "8 GPUs: " in held and "Adam's moments 6.3" in held
