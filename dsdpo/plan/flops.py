"""Floating-point operations that a step needs, and MFU: the share of the peak that they make.

    MFU = F / (step seconds * GPUs * peak FLOP/s of one GPU)

F counts what the layout must compute, without padding and without anything computed twice (gradient checkpointing,
the head's second pass): a multiplication and an addition are two operations. With

    N   weights of the decoder layers' linear maps          L, h   layers and hidden size
    A   weights of the LoRA matrices, 0 without             V      vocabulary
    T   tokens in the micro-batches                         C      scored completion tokens
    P   visible (query, key) pairs of the attention

    full   F = 6 N T                 + 12 L h P + 6 h V C
    LoRA   F = 4 N T + 6 A T         + 12 L h P + 4 h V C
    live   F is larger by one forward: 2 N T + 4 L h P + 2 h V C

6 is a forward and two backward products per weight; a frozen weight has no gradient of its own, hence 4. An example
with a prompt of p tokens and completions of n_1 … n_K has

    prompt computed once       T = p + sum n_k         P = (p² + sum n_k²) / 2 + p sum n_k
    for each completion        T = K p + sum n_k       P = sum (p + n_k)² / 2

and C = sum n_k where all tokens of its completions are scored.

So tokens/s are told twice: logical tokens (K p + sum n_k, whatever the layout) are what the user gains; physical
tokens, and MFU, are how well the hardware is used, which sharing a prompt does not inflate.
"""

from __future__ import annotations

import numpy as np

from dsdpo.data.example import Lengths
from dsdpo.plan.shape import ModelShape

# Dense bf16 TFLOP/s without sparsity, from the vendors' data sheets; the first name that the GPU's own contains counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "A10": 125.0,
}


def peak_tflops(gpu: str) -> float | None:
    """Of a GPU by its name; None for one that is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def visible_pairs(lengths: Lengths, share_prefix: bool) -> float:
    """P of these examples."""
    prompt = lengths.prompt.astype(np.float64)
    completions, prompts = lengths.completions.astype(np.float64), prompt[lengths.examples]
    if share_prefix:
        return float((prompt**2).sum() / 2 + (completions**2 / 2 + prompts * completions).sum())
    return float(((prompts + completions) ** 2).sum() / 2)


def step_flops(shape: ModelShape, lengths: Lengths, share_prefix: bool, live: bool) -> float:
    """F of a step over these examples.

    Args:
        share_prefix: whether a prompt is computed once for all of its completions.
        live: whether the reference is computed in the step.
    """
    t, scored = int(lengths.packed(share_prefix).sum()), int(lengths.loss_tokens.sum())
    attention = shape.layers * shape.hidden * visible_pairs(lengths, share_prefix)
    head = shape.hidden * shape.vocab * scored
    backbone = (4 * shape.linear + 6 * shape.lora) * t if shape.is_lora else 6 * shape.linear * t
    reference = 2 * shape.linear * t + 4 * attention + 2 * head if live else 0.0
    return backbone + 12 * attention + (4 if shape.is_lora else 6) * head + reference


def mfu(flops: float, seconds: float, gpus: int, peak: float) -> float:
    """MFU of a step.

    Args:
        flops: F of the step, over all GPUs.
        peak: TFLOP/s of one GPU.
    """
    return flops / (seconds * gpus * peak * 1e12)
