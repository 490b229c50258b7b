"""How long a step takes, from operations, bytes and rates: see bench/scaling.py, which tells it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bench.flops import PEAK_TFLOPS, Shape, step_flops
from bench.traffic import Setup, Sizes, collectives, nvme_bytes, pcie_bytes
from dsdpo.data.packing import plan_step

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
        lengths: prompt, chosen and rejected tokens of a step's pairs, int [B, 3].
    """

    shape: Shape
    sizes: Sizes
    setup: Setup
    rates: Rates
    gpus_per_node: int
    row_tokens: int
    checkpointing: bool
    lengths: np.ndarray


@dataclass(frozen=True)
class Step:
    """Seconds of one step by what takes them, and bytes.

    Attributes:
        sent: bytes that each GPU sends.
        crossing: bytes that leave each node.
    """

    gpus: int
    pairs: int
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


def compute_flops(job: Job, lengths: np.ndarray) -> float:
    """Operations of some pairs in a micro-step as they are executed, so with those that are repeated.

    The head's forward product runs again in its backward pass, since logits are never kept; with gradient checkpointing
    the layers' forward does too.
    """
    shape, lora = job.shape, job.sizes.lora
    p, c, r = lengths.astype(np.float64).T
    again = 2 * shape.hidden * shape.vocab * float((c + r).sum())
    if job.checkpointing:
        visible = float(((p**2 + c**2 + r**2) / 2 + p * (c + r)).sum())
        weights = shape.linear + (shape.lora if lora else 0)
        again += 2 * weights * float(lengths.sum()) + 4 * shape.layers * shape.hidden * visible
    return step_flops(shape, lengths, shared_prompt=True, full=not lora, live=job.setup.live) + again


def predict(job: Job, gpus: int) -> Step:
    """A step of the job's pairs on so many GPUs."""
    tokens = job.lengths.sum(axis=1)
    plan = plan_step(tokens, gpus, job.row_tokens)
    slowest = [max((compute_flops(job, job.lengths[row]) for row in rows if row), default=0.0) for rows in plan]
    rates, m = job.rates, len(plan)
    local = min(gpus, job.gpus_per_node)
    wires = {"links": 0.0, "network": 0.0}
    crossing = 0.0
    sent = 0.0
    for collective in collectives(job.sizes, job.setup, gpus, m):
        nodes = math.ceil(collective.group / job.gpus_per_node)
        hops, far = collective.group - 1, nodes - 1
        latency = rates.base + collective.ring * ((hops - far) * rates.near_hop + far * rates.far_hop)
        rate = rates.link if nodes == 1 else min(rates.link, rates.network)
        wires["links" if nodes == 1 else "network"] += collective.sent / rate + collective.calls * latency
        sent += collective.sent
        crossing += collective.sent if nodes > 1 else 0.0
    trained = job.sizes.trained / (gpus if job.setup.stage else 1)
    on_gpu = job.setup.optimizer == "gpu"
    disk = nvme_bytes(job.sizes, job.setup, gpus, m) * local / rates.nvme
    return Step(
        gpus=gpus,
        pairs=len(job.lengths),
        micro_steps=m,
        compute=sum(slowest) / rates.flops,
        links=wires["links"],
        network=wires["network"],
        host=pcie_bytes(job.sizes, job.setup, gpus, m) / rates.pcie + disk,
        update=_ADAM_BYTES * trained / (rates.hbm if on_gpu else rates.cpu / local),
        sent=sent,
        crossing=crossing,
    )


def efficiency(step: Step, one: Step, seconds: str = "least") -> float:
    """Pairs/s per GPU, over those of one GPU that trains the same step.

    Args:
        seconds: the end of the range, `least` or `most`.
    """
    return float(getattr(one, seconds) / getattr(step, seconds) / step.gpus)


def draw_lengths(pairs: int, mean: tuple[int, int, int], spread: float) -> np.ndarray:
    """Lengths of pairs, uniform within (1 +- spread) of the means; int64 [pairs, 3], always the same."""
    rng = np.random.default_rng(0)
    factors = rng.uniform(1 - spread, 1 + spread, size=(pairs, 3))
    return np.maximum(1, np.round(factors * np.array(mean))).astype(np.int64)
