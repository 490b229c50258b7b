"""How a training is spread over GPUs: what decides its memory and traffic beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsdpo.plan.shape import ModelShape

REUSE_DISTANCE = 10**9  # weights; stage3_max_reuse_distance of ds_configs/
BUCKET = 2 * 10**8  # gradients; reduce_bucket_size of ds_configs/


@dataclass(frozen=True)
class Setup:
    """What of a run config and DeepSpeed JSON decides memory and traffic.

    Attributes:
        stage: ZeRO's.
        element: bytes of a weight, 2 in bf16 and fp16, 4 in fp32.
        live: whether the reference is computed in every step.
        hpz: GPUs over which hpZ spreads its second copy; 1 without.
        optimizer: where its state lies; from stage 1 on the CPU, in stage 3 NVMe too.
        weights: where a GPU's own share of the weights lies, stage 3.
        reuse: weights that stay from the forward pass for the backward pass, `stage3_max_reuse_distance`.
        bits: of the frozen linear maps; None where they are not quantized.
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
    bits: Literal[4, 8] | None = None

    def weight_bytes(self, shape: ModelShape) -> float:
        """Of all weights as they are kept and sent, without the scales of quantized ones."""
        if self.bits is None:
            return float(self.element * shape.total)
        return self.element * (shape.total - shape.linear) + shape.linear * self.bits / 8

    def kept(self, shape: ModelShape) -> int:
        """Weights that are still there when the backward pass begins.

        LoRA with a live reference runs two kinds of forward pass in turn, and DeepSpeed then forgets in which order it
        will need the weights: it keeps none, and fetches none ahead.
        """
        return 0 if self.live and shape.is_lora else min(shape.total, self.reuse)
