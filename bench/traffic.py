"""What the GPUs of a training send to each other and keep, in bytes: formulae, and nothing measured.

With W GPUs, P weights of the policy (adapters included), T of them trained, e bytes a weight (2 in bf16, 4 in fp32),
and m micro-steps in a step, dsdpo under DeepSpeed 0.19 has these collectives in a step:

    stage 0   all-reduce of 4 T                                   once a step
    stage 1   all-reduce of 4 T, all-gather of e T                once a step
    stage 2   all-reduce of 4 T                                   in every micro-step
              all-gather of e T                                   once a step
    stage 3   all-gather of e P, forward, and e (P - R) backward  in every micro-step
              reduce-scatter of 4 T                               in every micro-step
    live      all-gather of e P' for the reference's forward      in every micro-step

4: gradients travel in fp32, in bf16 runs too. R: weights at the end of the forward pass that stay for the backward
pass, `stage3_max_reuse_distance`, up to a layer. Recomputed activations gather nothing again: a layer's backward pass
has its weights. Under LoRA all weights are gathered, frozen or not, and gradients of the adapters alone are sent. P' is
P for LoRA under stage 3, the whole model for full fine-tuning at any stage, and 0 for LoRA below stage 3, or with a
cached reference. tests/dist/test_traffic.py holds these lines against what real ranks send.

hpZ (ZeRO++, arXiv:2306.10209) keeps a second copy of the weights spread over each node: all gathers but the first one
after an update stay inside the node, and those of frozen weights do always.

A ring sends, from every GPU, (W-1)/W of the bytes in an all-gather or reduce-scatter and 2 (W-1)/W in an all-reduce.
That is how the ZeRO paper (arXiv:1910.02054, section 7) counts 2 units for stages 0 to 2 and 3 for stage 3. Here stages
1 and 2 take 3 as well in equal precision: DeepSpeed all-reduces a bucket of gradients that belong to several owners,
unless `use_multi_rank_bucket_allreduce` is false.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

REUSE_DISTANCE = 10**9  # weights; stage3_max_reuse_distance of ds_configs/
BUCKET = 2 * 10**8  # gradients; reduce_bucket_size of ds_configs/
_GRADIENT = 4  # bytes


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights.

    Attributes:
        total: P, all of the policy, adapters included.
        trained: T.
        largest: of the largest layer, which ZeRO-3 gathers at once.
        modules: pieces in which ZeRO-3 gathers a model: its layers, embeddings and head.
    """

    total: int
    trained: int
    largest: int
    modules: int

    @property
    def lora(self) -> bool:
        """Whether some weights are frozen."""
        return self.trained < self.total


@dataclass(frozen=True)
class Setup:
    """What of a run config and DeepSpeed JSON decides the traffic.

    Attributes:
        stage: ZeRO's.
        element: bytes of a weight, e above.
        live: whether the reference is computed in every step.
        hpz: GPUs over which hpZ spreads its second copy; 1 without.
        optimizer: where its state lies; from stage 1 on the CPU, in stage 3 NVMe too.
        weights: where a GPU's own share of the weights lies, stage 3.
        reuse: R above.
        owner_reduces: `use_multi_rank_bucket_allreduce: false`.
    """

    stage: int = 3
    element: int = 2
    live: bool = False
    hpz: int = 1
    optimizer: Literal["gpu", "cpu", "nvme"] = "gpu"
    weights: Literal["gpu", "cpu", "nvme"] = "gpu"
    reuse: int = REUSE_DISTANCE
    owner_reduces: bool = False

    def kept(self, sizes: Sizes) -> int:
        """Weights that are still there when the backward pass begins.

        LoRA with a live reference runs two kinds of forward pass in turn, and DeepSpeed then forgets in which order it
        will need the weights: it keeps none, and fetches none ahead.
        """
        return 0 if self.live and sizes.lora else min(sizes.total, self.reuse)


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step.

    Attributes:
        what: the reader's name for it.
        ring: times that the bytes go around: 1 for all-gather, reduce-scatter and reduce, 2 for all-reduce.
        bytes: gathered or reduced, whole, in all calls together.
        group: GPUs that take part together.
        calls: in a step.
    """

    what: str
    ring: int
    bytes: float
    group: int
    calls: int

    @property
    def sent(self) -> float:
        """Bytes that every GPU sends, and receives: ring * (g-1)/g * bytes."""
        return self.ring * (self.group - 1) / self.group * self.bytes


def collectives(sizes: Sizes, setup: Setup, gpus: int, micro_steps: int) -> list[Collective]:
    """What is sent in a step, see the module's docstring; sums of a few numbers left out.

    Args:
        gpus: W.
        micro_steps: m.
    """
    e, m, trained = setup.element, micro_steps, sizes.trained
    found = []
    if setup.stage == 3:
        found += _gathers(sizes, setup, gpus, m)
        found.append(Collective("gradients", 1, m * _GRADIENT * trained, gpus, m * _buckets(trained)))
    else:
        times = m if setup.stage == 2 else 1
        ring = 1 if setup.owner_reduces and setup.stage else 2
        found.append(Collective("gradients", ring, times * _GRADIENT * trained, gpus, times * _buckets(trained)))
        if setup.stage:
            found.append(Collective("new weights", 1, e * trained, gpus, _buckets(trained)))
        if setup.live and not sizes.lora:
            found.append(Collective("reference's weights", 1, m * e * sizes.total, gpus, m * sizes.modules))
    return [c for c in found if c.group > 1]


def _gathers(sizes: Sizes, setup: Setup, gpus: int, m: int) -> list[Collective]:
    """All-gathers of stage 3."""
    e, total, frozen = setup.element, sizes.total, sizes.total - sizes.trained
    whole = Collective("weights", 1, e * m * (2 * total - setup.kept(sizes)), gpus, 2 * m * sizes.modules)
    reference = Collective("reference's weights", 1, e * m * total, gpus, m * sizes.modules) if setup.live else None
    near = min(setup.hpz, gpus)
    if near == 1:
        return [whole, reference] if reference else [whole]
    # a reference of full fine-tuning is frozen; LoRA's is the policy
    first = e * (total - frozen)
    rest = whole.bytes - first + (reference.bytes if reference else 0)
    calls = whole.calls + (reference.calls if reference else 0) - sizes.modules
    return [
        Collective("weights", 1, first, gpus, sizes.modules),
        Collective("weights in the node", 1, rest, near, calls),
    ]


def _buckets(elements: int) -> int:
    return max(1, math.ceil(elements / BUCKET))


def pcie_bytes(sizes: Sizes, setup: Setup, gpus: int, micro_steps: int) -> float:
    """Between each GPU and its host in a step, both directions together, with state that is not on the GPU.

    Optimizer: a GPU's share of the fp32 gradients goes out in the first micro-step, in and out in each further one, and
    out once more for the update; new weights come back. Weights: a GPU's share comes in before each gather.
    """
    e, m = setup.element, micro_steps
    moved = 0.0
    if setup.optimizer != "gpu":
        moved += (2 * m * _GRADIENT + (e if setup.weights == "gpu" else 0)) * sizes.trained / gpus
    if setup.weights != "gpu":
        passes = 2 * sizes.total - setup.kept(sizes) + (sizes.total if setup.live else 0)
        moved += e * m * passes / gpus
    return moved


def nvme_bytes(sizes: Sizes, setup: Setup, gpus: int, micro_steps: int) -> float:
    """Read and written by each GPU's process in a step (ZeRO-Infinity, arXiv:2104.07857).

    The optimizer's 12 bytes a weight and its gradient go both ways. A share of the weights is read before each gather,
    and written after the update.
    """
    moved = 0.0
    if setup.optimizer == "nvme":
        moved += 2 * (12 + _GRADIENT) * sizes.trained / gpus
    if setup.weights == "nvme":
        passes = 2 * sizes.total - setup.kept(sizes) + (sizes.total if setup.live else 0)
        moved += setup.element * (micro_steps * passes + sizes.trained) / gpus
    return moved


def memory(sizes: Sizes, setup: Setup, gpus: int) -> dict[str, float]:
    """Bytes of GPU memory by part, without activations, CUDA context and fragmentation."""
    e, stage = setup.element, setup.stage
    by_state, by_gradient, by_weight = (gpus if stage >= low else 1 for low in (1, 2, 3))
    on_gpu = setup.optimizer == "gpu"
    reference = setup.live and not sizes.lora  # LoRA's is the policy with its adapter off
    parts = {
        "weights": e * sizes.total / by_weight if setup.weights == "gpu" else 0.0,
        "second copy (hpZ)": e * sizes.total / setup.hpz if stage == 3 and setup.hpz > 1 else 0.0,
        "fp32 weights": 4 * sizes.trained / by_state if on_gpu and stage else 0.0,
        "Adam's moments": 8 * sizes.trained / by_state if on_gpu else 0.0,
        "gradients": _GRADIENT * sizes.trained / by_gradient if on_gpu or stage < 2 else 0.0,
        "reference": e * sizes.total / gpus if reference else 0.0,
        "gathered": float(e * min(sizes.total, setup.kept(sizes) + 2 * sizes.largest)) if stage == 3 else 0.0,
        "buckets": float(_GRADIENT * BUCKET) if stage else 0.0,
    }
    return {name: held for name, held in parts.items() if held}
