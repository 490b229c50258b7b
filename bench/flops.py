"""Floating-point operations that a step needs, and MFU: the share of the peak that they make.

    MFU = F / (step seconds * GPUs * peak FLOP/s of one GPU)

F counts what the layout must compute, without padding and without anything computed twice (gradient checkpointing,
the head's second pass): a multiplication and an addition are two operations. With

    N   weights of the decoder layers' linear maps          L, h   layers and hidden size
    A   weights of the LoRA matrices, 0 without             V      vocabulary
    T   tokens in the rows                                  C      scored completion tokens
    P   visible (query, key) pairs of the attention

    full   F = 6 N T                 + 12 L h P + 6 h V C
    LoRA   F = 4 N T + 6 A T         + 12 L h P + 4 h V C
    live   F is larger by one forward: 2 N T + 4 L h P + 2 h V C

6 is a forward and two backward products per weight; a frozen weight has no gradient of its own, hence 4. A pair of p,
c and r tokens has, with the prompt computed once (dsdpo), T = p + c + r and P = (p² + c² + r²) / 2 + p (c + r); with it
computed twice (TRL), T = 2p + c + r and P = ((p + c)² + (p + r)²) / 2.

So tokens/s are told twice: logical tokens (2p + c + r on both sides) are what the user gains; physical tokens, and MFU,
are how well the hardware is used, which sharing a prompt does not inflate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

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


@dataclass(frozen=True)
class Shape:
    """What of a Llama-like model decides its operations; names as above."""

    layers: int
    hidden: int
    vocab: int
    linear: int
    lora: int

    @classmethod
    def of(cls, config: PretrainedConfig, lora_rank: int) -> Shape:
        """Of a model's config; with adapters of `lora_rank` on every linear layer, 0 for none."""
        h, inner = config.hidden_size, config.intermediate_size
        kv = h * config.num_key_value_heads // config.num_attention_heads
        maps = [(h, h), (h, kv), (h, kv), (h, h), (h, inner), (h, inner), (inner, h)]
        return cls(
            layers=config.num_hidden_layers,
            hidden=h,
            vocab=config.vocab_size,
            linear=config.num_hidden_layers * sum(a * b for a, b in maps),
            lora=config.num_hidden_layers * lora_rank * sum(a + b for a, b in maps),
        )


def tokens(lengths: np.ndarray, shared_prompt: bool) -> int:
    """T of pairs with these prompt, chosen and rejected lengths, int [N, 3]."""
    return int(lengths.sum() + (0 if shared_prompt else lengths[:, 0].sum()))


def step_flops(shape: Shape, lengths: np.ndarray, shared_prompt: bool, full: bool, live: bool) -> float:
    """F of a step over pairs with these prompt, chosen and rejected lengths, int [N, 3]."""
    p, c, r = lengths.astype(np.float64).T
    if shared_prompt:
        visible = ((p**2 + c**2 + r**2) / 2 + p * (c + r)).sum()
    else:
        visible = (((p + c) ** 2 + (p + r) ** 2) / 2).sum()
    t, scored = tokens(lengths, shared_prompt), (c + r).sum()
    attention, head = shape.layers * shape.hidden * visible, shape.hidden * shape.vocab * scored
    backbone = 6 * shape.linear * t if full else (4 * shape.linear + 6 * shape.lora) * t
    reference = 2 * shape.linear * t + 4 * attention + 2 * head if live else 0.0
    return backbone + 12 * attention + (6 if full else 4) * head + reference
