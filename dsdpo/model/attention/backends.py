"""The computation behind each `attn_implementation`: functions (query, key, value, layout, scale) -> output.

Shape suffixes: B batch (always 1), H query heads, G key/value heads, T tokens of the row, K gathered keys, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from dsdpo.compat import varlen_keywords
from dsdpo.model.attention.masks import PackedLayout

# (query [1, H, T, D], key [1, G, T, D], value [1, G, T, D], layout, scale) -> [1, H, T, D]
Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedLayout, float], torch.Tensor]
# (q [T, H, D], k [K, G, D], v [K, G, D], cu_q, cu_k, max_q, max_k, scale) -> [T, H, D]
VarlenKernel = Callable[..., torch.Tensor]


def sdpa(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, layout: PackedLayout, scale: float
) -> torch.Tensor:
    """One scaled_dot_product_attention call per segment. Returns [B, H, T, D].

    The row is split, not sliced: the backward of a slice fills zeros for the whole row, once per segment.
    """
    lengths = [s.length for s in layout.segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query_BHTD, key_BGTD, value_BGTD))
    outputs = []
    for i, prefix in enumerate(layout.prefix_of):
        key, value, mask = keys[i], values[i], None
        if prefix is not None:
            key = torch.cat([keys[prefix], key], dim=2)
            value = torch.cat([values[prefix], value], dim=2)
            mask = layout.causal_mask(lengths[i], key.shape[2])
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i],
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query_BHTD.shape[1] != key_BGTD.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


def varlen_attention(
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    layout: PackedLayout,
    scale: float,
    kernel: VarlenKernel,
) -> torch.Tensor:
    """One variable-length call for the whole row: the prompt's keys and values are copied once per completion.

    The kernel aligns its causal mask bottom right, so a completion's queries see the prompt and themselves. Queries,
    keys and values lie in memory as [T, heads, D], as their projections have written them: only the copies move.
    """
    cu_q, cu_k, max_q, max_k = layout.varlen
    # squeezed, not indexed: the backward of x[0] fills zeros and copies
    query_THD, key_TGD, value_TGD = (x.squeeze(0).transpose(0, 1) for x in (query_BHTD, key_BGTD, value_BGTD))
    key_KGD, value_KGD = (layout.keys(x.flatten(1)).unflatten(1, x.shape[1:]) for x in (key_TGD, value_TGD))
    output_THD = kernel(query_THD, key_KGD, value_KGD, cu_q, cu_k, max_q, max_k, scale)
    return output_THD.transpose(0, 1).unsqueeze(0)


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    """torch's own kernel, FlashAttention 2 inside. Its backward repeats bit for bit where torch is told to."""
    from torch.nn.attention.varlen import varlen_attn

    gqa: Any = varlen_keywords(q.shape[1] != k.shape[1])
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), **gqa)


def _repeats(function: Callable[..., Any]) -> dict[str, bool]:
    """What tells a function of flash-attention to compute gradients without atomics, where `deterministic` is set."""
    if not torch.are_deterministic_algorithms_enabled() or "deterministic" not in _parameters(function):
        return {}
    return {"deterministic": True}


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _flash_2(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    """The package flash-attn, written for 2.8."""
    from flash_attn import flash_attn_varlen_func as attend

    return attend(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, **_repeats(attend))


def _flash_3(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    """The package flash-attn-3 (flash-attention's folder hopper); written from its source, run by no test yet."""
    from flash_attn_interface import flash_attn_varlen_func as attend

    out = attend(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, **_repeats(attend))
    return out[0] if isinstance(out, tuple) else out  # early builds give the log-sum-exp as well


def _flash_4(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    """The package flash-attn-4; written from the source of 4.0.0b36, run by no test yet."""
    from flash_attn.cute import flash_attn_varlen_func as attend

    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    out, _ = attend(q, k, v, **lengths, softmax_scale=scale, causal=True, **_repeats(attend))
    return out


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    """FlexAttention as one kernel; uncompiled it holds the scores of the whole row. Dynamic: rows differ in length."""
    return torch.compile(flex_attention, dynamic=True)


def flex(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, layout: PackedLayout, scale: float
) -> torch.Tensor:
    """FlexAttention under the row's block mask, compiled on CUDA. Returns [B, H, T, D].

    Only CUDA has a backward: torch refuses one on CPU.
    """
    attend: Callable[..., torch.Tensor] = flex_attention
    if query_BHTD.device.type == "cuda":
        attend = _compiled_flex()
    gqa = query_BHTD.shape[1] != key_BGTD.shape[1]
    return attend(query_BHTD, key_BGTD, value_BGTD, block_mask=layout.block_mask, scale=scale, enable_gqa=gqa)


# The kernels behind these compute in 16 bit, on NVIDIA's Ampere and later.
VARLEN_KERNELS: dict[str, VarlenKernel] = {
    "varlen": _torch_varlen,
    "flash_attention_2": _flash_2,
    "flash_attention_3": _flash_3,
    "flash_attention_4": _flash_4,
}

BACKENDS: dict[str, Backend] = {
    "sdpa": sdpa,
    "flex_attention": flex,
    **{name: partial(varlen_attention, kernel=kernel) for name, kernel in VARLEN_KERNELS.items()},
}
