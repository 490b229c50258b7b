"""How long a step takes, from operations, bytes and rates: see bench/scaling.py, which tells it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dsdpo.data.example import Lengths
from dsdpo.data.packing import plan_step
from dsdpo.plan.flops import PEAK_TFLOPS, step_flops, visible_pairs
from dsdpo.plan.memory import Recompute
from dsdpo.plan.setup import Setup
from dsdpo.plan.shape import ModelShape
from dsdpo.plan.traffic import collectives, nvme_bytes, pcie_bytes

COMPUTE_SHARE, WIRE_SHARE = 0.45, 0.8  # of the data sheets' numbers: assumed
_BASE_S, _NEAR_HOP_S, _FAR_HOP_S = 8.4e-6, 3.4e-6, 14e-6
_ADAM_BYTES = 30  # fp32 weight, gradient and moments read, three of them and a bf16 weight written


@dataclass(frozen=True)
class Rates:
    """Of one GPU and its node: FLOP/s and bytes/s in one direction that are reached, and bytes of GPU memory.

    Attributes:
        link: what a GPU sends to the others of its node.
        network: what a node sends to others, all its cards together.
        cpu: memory of a node's CPUs.
        nvme: of a node.
    """

    flops: float
    memory: float
    hbm: float
    link: float
    network: float
    pcie: float
    cpu: float = 100e9
    nvme: float = 10e9
    base: float = _BASE_S
    near_hop: float = _NEAR_HOP_S
    far_hop: float = _FAR_HOP_S


def _sheet(tflops: float, gib: int, hbm: float, link: float, network: float, pcie: float) -> Rates:
    wires = (WIRE_SHARE * 1e9 * rate for rate in (hbm, link, network, pcie))
    return Rates(COMPUTE_SHARE * 1e12 * tflops, gib * 2**30, *wires)


# Peak TFLOP/s, GiB, and GB/s in one direction: memory, NVLink, eight 200 or 400 Gb/s cards, PCIe 4 or 5 x16.
GPUS = {
    "a100": _sheet(PEAK_TFLOPS["A100"], 80, 2039, 300, 200, 32),
    "h100": _sheet(PEAK_TFLOPS["H100"], 80, 3350, 450, 400, 64),
    "h200": _sheet(PEAK_TFLOPS["H200"], 140, 4800, 450, 400, 64),
}


@dataclass(frozen=True)
class Job:
    """What is trained where.

    Attributes:
        row_tokens: the longest micro-batch, in tokens.
        recompute: what of the layers' forward pass runs again in the backward pass.
        lengths: of a step's B examples.
    """

    shape: ModelShape
    setup: Setup
    rates: Rates
    gpus_per_node: int
    row_tokens: int
    recompute: Recompute
    lengths: Lengths


@dataclass(frozen=True)
class Step:
    """Seconds of one step by what takes them, and bytes.

    Attributes:
        sent: bytes that each GPU sends.
        crossing: bytes that leave each node.
    """

    gpus: int
    examples: int
    micro_steps: int
    compute: float
    links: float
    network: float
    host: float
    update: float
    sent: float
    crossing: float

    @property
    def least(self) -> float:
        """All of it overlapped."""
        return max(self.compute, self.links, self.network, self.host) + self.update

    @property
    def most(self) -> float:
        """Nothing overlapped."""
        return self.compute + self.links + self.network + self.host + self.update

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {name: getattr(self, name) for name in ("compute", "links", "network", "host", "update")}
        return max(parts, key=lambda name: parts[name])


def compute_flops(job: Job, lengths: Lengths) -> float:
    """Operations of some examples in a micro-step as they are executed, so with those that are repeated.

    The head's forward product runs again in its backward pass, since logits are never kept; with `full` gradient
    checkpointing the layers' forward does too. What `selective` computes again are no products.
    """
    shape = job.shape
    again = 2 * shape.hidden * shape.vocab * float(lengths.loss_tokens.sum())
    if job.recompute == "full":
        tokens = float(lengths.packed(share_prefix=True).sum())
        attention = 4 * shape.layers * shape.hidden * visible_pairs(lengths, share_prefix=True)
        again += 2 * (shape.linear + shape.lora) * tokens + attention
    return step_flops(shape, lengths, share_prefix=True, live=job.setup.live) + again


def predict(job: Job, gpus: int) -> Step:
    """A step of the job's examples on so many GPUs."""
    plan = plan_step(job.lengths.packed(share_prefix=True), gpus, job.row_tokens)
    slowest = [
        max((compute_flops(job, job.lengths.select(indices)) for indices in micro_step if indices), default=0.0)
        for micro_step in plan
    ]
    rates, m = job.rates, len(plan)
    local = min(gpus, job.gpus_per_node)
    wires = {"links": 0.0, "network": 0.0}
    crossing = 0.0
    sent = 0.0
    for collective in collectives(job.shape, job.setup, gpus, m):
        nodes = math.ceil(collective.group / job.gpus_per_node)
        hops, far = collective.group - 1, nodes - 1
        latency = rates.base + collective.ring * ((hops - far) * rates.near_hop + far * rates.far_hop)
        rate = rates.link if nodes == 1 else min(rates.link, rates.network)
        wires["links" if nodes == 1 else "network"] += collective.sent / rate + collective.calls * latency
        sent += collective.sent
        crossing += collective.sent if nodes > 1 else 0.0
    trained = job.shape.trained / (gpus if job.setup.stage else 1)
    on_gpu = job.setup.optimizer == "gpu"
    disk = nvme_bytes(job.shape, job.setup, gpus, m) * local / rates.nvme
    return Step(
        gpus=gpus,
        examples=len(job.lengths),
        micro_steps=m,
        compute=sum(slowest) / rates.flops,
        links=wires["links"],
        network=wires["network"],
        host=pcie_bytes(job.shape, job.setup, gpus, m) / rates.pcie + disk,
        update=_ADAM_BYTES * trained / (rates.hbm if on_gpu else rates.cpu / local),
        sent=sent,
        crossing=crossing,
    )


def efficiency(step: Step, one: Step, seconds: str = "least") -> float:
    """Examples/s per GPU, over those of one GPU that trains the same step.

    Args:
        seconds: the end of the range, `least` or `most`.
    """
    return float(getattr(one, seconds) / getattr(step, seconds) / step.gpus)


def draw_lengths(examples: int, mean: tuple[int, ...], spread: float) -> Lengths:
    """Lengths of made-up examples, uniform within (1 +- spread) of the means; always the same.

    Args:
        mean: tokens of the prompt, and of each completion.
    """
    rng = np.random.default_rng(0)
    factors = rng.uniform(1 - spread, 1 + spread, size=(examples, len(mean)))
    return Lengths.from_table(np.maximum(1, np.round(factors * np.array(mean))).astype(np.int64))
