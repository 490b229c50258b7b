"""What a run computes in, and the rule for the loss scale of fp16.

fp16 has no numbers beyond 65504 and few below 6e-5, where gradients lie: the loss is multiplied by a scale before the
backward pass, and the gradients are divided by it before the optimizer's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

FP16 = "fp16"
# of the block in the DeepSpeed JSON, with DeepSpeed's own defaults
_DEFAULTS = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "min_loss_scale": 1}


def precision_of(asked: Literal["auto"] | Precision, cuda: bool) -> Precision:
    """The precision of a run: `auto` is bf16 on CUDA, fp32 elsewhere."""
    if asked == "auto":
        return "bf16" if cuda else "fp32"
    return asked


@dataclass(frozen=True)
class ScaleRule:
    """How the loss scale of a run in fp16 begins and changes.

    Attributes:
        first: scale of the first step.
        lowest: below which it is never lowered.
        window: steps without an overflow after which it is doubled; None: the scale is always `first`.
    """

    first: float
    lowest: float
    window: int | None

    @classmethod
    def of(cls, data: dict[str, Any]) -> ScaleRule:
        """What the block `fp16` of a DeepSpeed JSON without problems says; `auto` is the default."""
        block = data.get(FP16, {})
        given = block if isinstance(block, dict) else {}
        values = {
            key: default if given.get(key, "auto") == "auto" else given[key] for key, default in _DEFAULTS.items()
        }
        if values["loss_scale"]:
            return cls(float(values["loss_scale"]), float(values["loss_scale"]), None)
        first = 2.0 ** int(values["initial_scale_power"])
        return cls(first, float(values["min_loss_scale"]), int(values["loss_scale_window"]))


def no_fp16(device: str) -> str:
    """What to say of a device, as DeepSpeed names its kind, that cannot compute in fp16."""
    needs = "DeepSpeed trains in fp16 on CPUs with AVX512-FP16 alone"
    if device != "cpu":
        needs = "fp16 needs GPUs of compute capability 7.0 (Volta) or higher"
    return f"precision is fp16, but the {device} here has none: {needs}; set precision: fp32"
