"""Bytes that a training keeps: of GPU memory, in a checkpoint, on NVMe; and the longest micro-batch that fits.

Formulas of a model's shape; nothing is measured here. The room checks of disks, `max_tokens_per_row: auto` and
bench/scaling.py use them.
"""

from __future__ import annotations

from dsdpo.plan.setup import BUCKET, Setup
from dsdpo.plan.shape import ModelShape

CPU_ROW_TOKENS = 8192
USABLE = 0.9  # of a GPU's memory; the rest goes to fragmentation, NCCL and the CUDA context
GRADIENT_BYTES = 4  # for a trained weight: gradients are kept and sent in fp32, in bf16 runs too
_WEIGHT_BYTES = 4  # the fp32 copy that the optimizer works on
_MOMENTS_BYTES = 8  # Adam's two moments in fp32, which appear in the first step
STATE_BYTES = _WEIGHT_BYTES + _MOMENTS_BYTES  # what a checkpoint has of a trained weight
NVME_BYTES = STATE_BYTES + GRADIENT_BYTES  # what DeepSpeed's files on NVMe have of it
_SPARE_BYTES = 2**24  # of a checkpoint: run.json, manifest, headers, random states
_GRANULE = 256


def activation_bytes_per_token(shape: ModelShape, element: int, checkpointing: bool) -> int:
    """What one token of a micro-batch keeps in memory until the backward pass.

    For each layer, with hidden size h, key/value size g, MLP size i and e bytes an element:
    e (8h + 6g + 4i) for the inputs of the linear layers, attention, residuals and activation, and 8h for the norms'
    copies in fp32. With gradient checkpointing, e h for each layer and the above for one.

    Args:
        element: bytes of an activation: 2 in bf16 and fp16, 4 in fp32.
        checkpointing: whether layers are recomputed.
    """
    h = shape.hidden
    layer = element * (8 * h + 6 * shape.key_value + 4 * shape.intermediate) + 8 * h
    return shape.layers * element * h + layer if checkpointing else shape.layers * layer


def moments_bytes(trained: int, stage: int, gpus: int) -> int:
    """Adam's moments on each GPU; ZeRO shards them from stage 1 on."""
    return _MOMENTS_BYTES * trained // (gpus if stage >= 1 else 1)


def gradient_bytes(trained: int, stage: int, gpus: int) -> int:
    """Gradients on each GPU; ZeRO shards them from stage 2 on."""
    return GRADIENT_BYTES * trained // (gpus if stage >= 2 else 1)


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


def longest_row(free: int, per_token: int, max_length: int) -> int:
    """Tokens that fit into `free` bytes, in steps of 256.

    Never below 2 * max_length, which one example with two completions may take.
    """
    return max(2 * max_length, free // per_token // _GRANULE * _GRANULE)


def row_tokens(
    shape: ModelShape,
    stage: int,
    gpus: int,
    element: int,
    checkpointing: bool,
    max_length: int,
    gpu_memory: int,
    allocated: int,
) -> int:
    """The longest micro-batch that fits beside a model that is loaded and not yet trained.

    Args:
        stage: ZeRO's.
        element: bytes of an activation.
        gpu_memory: bytes of the GPU.
        allocated: those that are taken.
    """
    # The largest tensor, the embeddings or the head, is gathered whole, and takes as much again.
    growth = moments_bytes(shape.trained, stage, gpus) + gradient_bytes(shape.trained, stage, gpus)
    free = int(gpu_memory * USABLE) - allocated - growth - 2 * element * shape.largest_tensor
    return longest_row(max(free, 0), activation_bytes_per_token(shape, element, checkpointing), max_length)
