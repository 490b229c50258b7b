"""What the GPUs of a training send to each other, in bytes: formulas, and nothing measured.

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
cached reference. Of quantized linear maps e is 1/2 or 1: packed values are gathered, and scales never.
tests/dist/test_traffic.py holds these lines against what real ranks send.

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

from dsdpo.plan.memory import GRADIENT_BYTES, NVME_BYTES
from dsdpo.plan.setup import BUCKET, Setup
from dsdpo.plan.shape import ModelShape


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


def collectives(shape: ModelShape, setup: Setup, gpus: int, micro_steps: int) -> list[Collective]:
    """What is sent in a step, see the module's docstring; sums of a few numbers left out.

    Args:
        gpus: W.
        micro_steps: m.
    """
    e, m, trained = setup.element, micro_steps, shape.trained
    found = []
    if setup.stage == 3:
        found += _gathers(shape, setup, gpus, m)
        found.append(Collective("gradients", 1, m * GRADIENT_BYTES * trained, gpus, m * _buckets(trained)))
    else:
        times = m if setup.stage == 2 else 1
        ring = 1 if setup.owner_reduces and setup.stage else 2
        found.append(Collective("gradients", ring, times * GRADIENT_BYTES * trained, gpus, times * _buckets(trained)))
        if setup.stage:
            found.append(Collective("new weights", 1, e * trained, gpus, _buckets(trained)))
        if setup.live and not shape.is_lora:
            found.append(Collective("reference's weights", 1, m * e * shape.total, gpus, m * shape.modules))
    return [c for c in found if c.group > 1]


def _gathers(shape: ModelShape, setup: Setup, gpus: int, m: int) -> list[Collective]:
    """All-gathers of stage 3."""
    e, total, frozen = setup.element, shape.total, shape.total - shape.trained
    each = setup.weight_bytes(shape) / total
    whole = Collective("weights", 1, each * m * (2 * total - setup.kept(shape)), gpus, 2 * m * shape.modules)
    reference = Collective("reference's weights", 1, each * m * total, gpus, m * shape.modules) if setup.live else None
    near = min(setup.hpz, gpus)
    if near == 1:
        return [whole, reference] if reference else [whole]
    # a reference of full fine-tuning is frozen; LoRA's is the policy
    first = e * (total - frozen)
    rest = whole.bytes - first + (reference.bytes if reference else 0)
    calls = whole.calls + (reference.calls if reference else 0) - shape.modules
    return [
        Collective("weights", 1, first, gpus, shape.modules),
        Collective("weights in the node", 1, rest, near, calls),
    ]


def _buckets(elements: int) -> int:
    return max(1, math.ceil(elements / BUCKET))


def pcie_bytes(shape: ModelShape, setup: Setup, gpus: int, micro_steps: int) -> float:
    """Between each GPU and its host in a step, both directions together, with state that is not on the GPU.

    Optimizer: a GPU's share of the fp32 gradients goes out in the first micro-step, in and out in each further one, and
    out once more for the update; new weights come back. Weights: a GPU's share comes in before each gather.
    """
    e, m = setup.element, micro_steps
    moved = 0.0
    if setup.optimizer != "gpu":
        moved += (2 * m * GRADIENT_BYTES + (e if setup.weights == "gpu" else 0)) * shape.trained / gpus
    if setup.weights != "gpu":
        passes = 2 * shape.total - setup.kept(shape) + (shape.total if setup.live else 0)
        moved += e * m * passes / gpus
    return moved


def nvme_bytes(shape: ModelShape, setup: Setup, gpus: int, micro_steps: int) -> float:
    """Read and written by each GPU's process in a step (ZeRO-Infinity, arXiv:2104.07857).

    The optimizer's 12 bytes a weight and its gradient go both ways. A share of the weights is read before each gather,
    and written after the update.
    """
    moved = 0.0
    if setup.optimizer == "nvme":
        moved += 2 * NVME_BYTES * shape.trained / gpus
    if setup.weights == "nvme":
        passes = 2 * shape.total - setup.kept(shape) + (shape.total if setup.live else 0)
        moved += setup.element * (micro_steps * passes + shape.trained) / gpus
    return moved
