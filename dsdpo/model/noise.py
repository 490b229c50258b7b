"""NEFTune: noise on the embeddings that depends on the seed, the step and the example alone.

Jain et al., "NEFTune: Noisy embeddings improve instruction finetuning" (arXiv 2310.05914). Each number is a hash of its
place, so every device, packing and number of ranks gives the same ones.
"""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # SplitMix64's constants, as signed 64-bit numbers
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def embedding_noise(keys: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    """Uniform noise in [-scale, scale) / sqrt(size).

    Args:
        keys: int64 [T], one for each token.
        scales: fp32 [T], alpha / sqrt(tokens of the token's sequence).
        size: of an embedding.

    Returns:
        fp32 [T, size].
    """
    places = torch.arange(1, size + 1, device=keys.device) * _GOLDEN
    z = keys[:, None] + places
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    z = z ^ _shifted(z, 31)
    return (_shifted(z, 40).float() / 2**23 - 1) * (scales / size**0.5)[:, None]


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted to the right as unsigned numbers."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
