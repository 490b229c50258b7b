"""Bytes that a training keeps: of GPU memory, in a checkpoint, on NVMe; and the longest micro-batch that fits.

Formulas of a model's shape; nothing is measured here. The room checks of disks, `max_tokens_per_row` and
`gradient_checkpointing` on GPUs, and bench/scaling.py use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from dsdpo.plan.setup import BUCKET, Setup
from dsdpo.plan.shape import ModelShape

Recompute: TypeAlias = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)  # the fastest first

CPU_ROW_TOKENS = 8192
USEFUL_ROW = 8192  # tokens; a GPU gains little from longer ones, but for ZeRO-3's gathers
USABLE = 0.9  # of a GPU's memory; the rest goes to fragmentation, NCCL and the CUDA context
_OF_WHAT_IS_LEFT = 0.95  # of what other processes, NCCL and the context leave; the rest goes to fragmentation
GRADIENT_BYTES = 4  # for a trained weight: gradients are kept and sent in fp32, in bf16 runs too
_WEIGHT_BYTES = 4  # the fp32 copy that the optimizer works on
_MOMENTS_BYTES = 8  # Adam's two moments in fp32, which appear in the first step
STATE_BYTES = _WEIGHT_BYTES + _MOMENTS_BYTES  # what a checkpoint has of a trained weight
NVME_BYTES = STATE_BYTES + GRADIENT_BYTES  # what DeepSpeed's files on NVMe have of it
_SPARE_BYTES = 2**24  # of a checkpoint: run.json, manifest, headers, random states
_GRANULE = 128
_HEAD_BYTES = 14 * 8192


def activation_bytes_per_token(shape: ModelShape, element: int, recompute: Recompute) -> int:
    """What one token of a micro-batch takes at most: kept until the backward pass, and beside that while it runs.

    With hidden size h, key/value size g, MLP size i and e bytes an element, a layer keeps

        none       e (8h + 6g + 4i) + 8h   inputs of linear layers, attention, residuals, activation; norms in fp32
        selective  e (5h + 2g + 2i)        the layer's input; results of its linear layers and of attention
        full       e h                     the layer's input

    and where layers are computed again, one of them is there in full, with 4 e h for its gradients. The head, which
    comes before the layers' backward pass, takes 14 bytes for each of 8192 columns of the vocabulary.

    Args:
        element: bytes of an activation: 2 in bf16 and fp16, 4 in fp32.
        recompute: `gradient_checkpointing`, decided.
    """
    h, kept = shape.hidden, _kept_by_layer(shape, element)
    again = 0 if recompute == "none" else kept["none"] + 4 * element * h
    return shape.layers * kept[recompute] + max(again, _HEAD_BYTES)


def _kept_by_layer(shape: ModelShape, element: int) -> dict[Recompute, int]:
    h, g, i = shape.hidden, shape.key_value, shape.intermediate
    return {
        "none": element * (8 * h + 6 * g + 4 * i) + 8 * h,
        "selective": element * (5 * h + 2 * g + 2 * i),
        "full": element * h,
    }


def choose_recompute(row: dict[Recompute, int], useful: int) -> Recompute:
    """The first of none, selective and full whose longest row is a useful one, else the last.

    Args:
        row: -> tokens of the longest row.
    """
    return next((one for one in RECOMPUTE if row[one] >= useful), "full")


def moments_bytes(trained: int, stage: int, gpus: int) -> int:
    """Adam's moments on each GPU; ZeRO shards them from stage 1 on."""
    return _MOMENTS_BYTES * trained // (gpus if stage >= 1 else 1)


def gradient_bytes(trained: int, stage: int, gpus: int) -> int:
    """Gradients on each GPU; ZeRO shards them from stage 2 on."""
    return GRADIENT_BYTES * trained // (gpus if stage >= 2 else 1)


def later_gradient_bytes(trained: int, stage: int, gpus: int, offloads: bool) -> int:
    """Of `gradient_bytes`, what is not there before the first backward pass. Stage 3 has its buffer from the start, on
    the CPU where the optimizer is offloaded; so offloaded, stage 2 keeps them on the CPU."""
    return 0 if stage == 3 or (offloads and stage == 2) else gradient_bytes(trained, stage, gpus)


def gpu_bytes(shape: ModelShape, setup: Setup, gpus: int) -> dict[str, float]:
    """GPU memory by part, without activations, CUDA context and fragmentation."""
    e, stage = setup.element, setup.stage
    by_state, by_weight = (gpus if stage >= low else 1 for low in (1, 3))
    on_gpu = setup.optimizer == "gpu"
    reference = setup.live and not shape.is_lora  # LoRA's is the policy with its adapter off
    weights = setup.weight_bytes(shape)
    gathered = weights / shape.total * min(shape.total, setup.kept(shape) + 2 * shape.largest)
    parts = {
        "weights": weights / by_weight if setup.weights == "gpu" else 0.0,
        "scales of quantized weights": scale_bytes(shape, setup.bits),
        "a dequantized layer": float(e * shape.hidden * shape.intermediate) if setup.bits else 0.0,
        "second copy (hpZ)": weights / setup.hpz if stage == 3 and setup.hpz > 1 else 0.0,
        "fp32 weights": _WEIGHT_BYTES * shape.trained / by_state if on_gpu and stage else 0.0,
        "Adam's moments": moments_bytes(shape.trained, stage, gpus) if on_gpu else 0.0,
        "gradients": gradient_bytes(shape.trained, stage, gpus) if on_gpu or stage < 2 else 0.0,
        "reference": e * shape.total / gpus if reference else 0.0,
        "gathered": gathered if stage == 3 else 0.0,
        "buckets": float(GRADIENT_BYTES * BUCKET) if stage else 0.0,
    }
    return {name: held for name, held in parts.items() if held}


def scale_bytes(shape: ModelShape, bits: int | None) -> float:
    """Scales of quantized linear maps, which every GPU has, whatever the stage.

    In 4 bits one for 64 weights, itself in 8 bits with a scale in fp32 for 256 (double quantization). In 8 bits an fp32
    scale for a row.
    """
    if bits is None:
        return 0.0
    return shape.linear / 64 * (1 + 4 / 256) if bits == 4 else 4 * shape.linear / shape.hidden


def checkpoint_bytes(trained: int) -> int:
    """Size of a checkpoint, estimated: fp32 weight and moments for each of so many trained weights."""
    return STATE_BYTES * trained + _SPARE_BYTES


def swap_bytes(trained: int, gpus: int, gpus_here: int) -> int:
    """What a node with `gpus_here` of all GPUs has on NVMe when the optimizer's state is offloaded to it."""
    return NVME_BYTES * trained * gpus_here // gpus


def longest_row(free: int, per_token: float, least: int) -> int:
    """Tokens that fit into `free` bytes, in steps of 128; never below `least`, which the longest example takes."""
    return max(least, int(free / per_token) // _GRANULE * _GRANULE)


def shorter_row(row: int, least: int) -> int | None:
    """What to try where a row was too long: half of it, in steps of 128, but at least what the longest example takes;
    None where that is no less."""
    half = row // 2 // _GRANULE * _GRANULE or row // 2
    shorter = max(half, least)
    return shorter if shorter < row else None


def usable_bytes(total: int, free: int, reserved: int) -> int:
    """What this process may take of a GPU's memory, with what it has. The same from run to run where it is alone.

    Args:
        total, free: bytes of the GPU, and those that no process holds.
        reserved: those that this process's allocator holds.
    """
    return round(min(USABLE * total, _OF_WHAT_IS_LEFT * (free + reserved)))


def free_bytes(
    shape: ModelShape, stage: int, gpus: int, element: int, usable: int, allocated: int, offloads: bool
) -> int:
    """What a model that is loaded and not yet trained leaves to activations.

    Args:
        stage: ZeRO's.
        element: bytes of an activation.
        usable: bytes of the GPU, see `usable_bytes`.
        allocated: those that are taken.
        offloads: whether the optimizer's state lies on the CPU or on NVMe.
    """
    moments = 0 if offloads else moments_bytes(shape.trained, stage, gpus)
    growth = moments + later_gradient_bytes(shape.trained, stage, gpus, offloads)
    # The largest tensor, the embeddings or the head, is gathered whole, and takes as much again.
    return max(usable - allocated - growth - 2 * element * shape.largest_tensor, 0)


@dataclass(frozen=True)
class MeasuredStep:
    """What the allocator of a rank said of the first step, in bytes.

    Attributes:
        tokens: of the longest micro-batch; 0 where the rank had no examples.
        before: taken before the step.
        peak: most that was taken before the optimizer's update.
        after: taken after the step: Adam's moments are there now.
        gradients: taken between forward pass and update and not before, by the formula.
        usable: that may be taken at all.
    """

    tokens: int
    before: int
    peak: int
    after: int
    gradients: int
    usable: int


def corrected_row(steps: list[MeasuredStep], least: int) -> int | None:
    """The longest row by what the first step took, the same for all ranks; None where it tells nothing.

    A rank's activations, divided by the tokens of its longest micro-batch, are what a token takes: with parts that do
    not grow with the row, so rather too much. Ranks count that had at least half of the longest micro-batch.

    Args:
        steps: of each rank.
        least: tokens of the longest example.
    """
    longest = max(step.tokens for step in steps)
    rows = []
    for step in steps:
        taken = step.peak - step.before - step.gradients
        if longest and 2 * step.tokens >= longest and taken > 0:
            free = max(step.usable - step.after - step.gradients, 0)
            rows.append(longest_row(free, taken / step.tokens, least))
    return min(rows, default=None)
