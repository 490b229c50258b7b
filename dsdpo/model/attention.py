"""Attention over packed rows, as attention functions that transformers calls in place of its own.

`RowLayout` travels to every attention layer as the model keyword `row_layout`. No mask function is registered under
our names, so transformers builds no mask and never guesses document borders from position ids.

Shape suffixes: B batch (always 1), H query heads, G key/value heads, T tokens of the row, K gathered keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PretrainedConfig

from dsdpo.data.packing import Segment
from dsdpo.errors import ConfigError

PREFIX = "dsdpo_"


@dataclass
class RowLayout:
    """Who attends to whom in one row. Masks and indices are made at first use and shared by all layers."""

    segments: list[Segment]
    device: torch.device
    _masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _varlen: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int] | None = None

    def causal_mask(self, queries: int, keys: int) -> torch.Tensor:
        """Causal mask aligned bottom right, bool [queries, keys]: the last query sees every key."""
        if (queries, keys) not in self._masks:
            full = torch.ones(queries, keys, dtype=torch.bool, device=self.device)
            self._masks[queries, keys] = full.tril(keys - queries)
        return self._masks[queries, keys]

    def varlen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """What one variable-length call needs.

        Returns:
            key_index int64 [K], the row positions of each segment's prefix and own tokens; cumulative lengths of
            queries and of keys, int32 [S+1]; the longest query and key length.
        """
        if self._varlen is None:
            q_lens = torch.tensor([s.length for s in self.segments])
            k_lens = torch.tensor([s.prefix_length + s.length for s in self.segments])
            key_index = torch.cat(
                [
                    torch.arange(begin, begin + length)
                    for s in self.segments
                    for begin, length in ((s.prefix_start, s.prefix_length), (s.start, s.length))
                ]
            )
            cumulative = [F.pad(lens.cumsum(0), (1, 0)).to(torch.int32) for lens in (q_lens, k_lens)]
            self._varlen = (
                key_index.to(self.device, non_blocking=True),
                cumulative[0].to(self.device, non_blocking=True),
                cumulative[1].to(self.device, non_blocking=True),
                int(q_lens.max()),
                int(k_lens.max()),
            )
        return self._varlen


def _sdpa(
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    layout: RowLayout,
    scale: float,
) -> torch.Tensor:
    """One scaled_dot_product_attention call per segment. Returns [B, H, T, D]."""
    outputs = []
    for start, length, prefix_start, prefix_length in layout.segments:
        query = query_BHTD[:, :, start : start + length]
        key, value = (x[:, :, start : start + length] for x in (key_BGTD, value_BGTD))
        mask = None
        if prefix_length:
            prefix = slice(prefix_start, prefix_start + prefix_length)
            key = torch.cat([key_BGTD[:, :, prefix], key], dim=2)
            value = torch.cat([value_BGTD[:, :, prefix], value], dim=2)
            mask = layout.causal_mask(length, prefix_length + length)
        outputs.append(
            F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query_BHTD.shape[1] != key_BGTD.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


# (q [T, H, D], k [K, G, D], v [K, G, D], cu_q, cu_k, max_q, max_k, scale) -> [T, H, D]
VarlenKernel = Callable[..., torch.Tensor]


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    from torch.nn.attention.varlen import varlen_attn

    gqa = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), enable_gqa=gqa)


def _flash_attn_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True)


def varlen_attention(
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    layout: RowLayout,
    scale: float,
    kernel: VarlenKernel,
) -> torch.Tensor:
    """One variable-length call for the whole row: the prompt's keys and values are gathered once per completion.

    The kernel aligns its causal mask bottom right, so a completion's queries see the prompt and themselves.
    """
    key_index, cu_q, cu_k, max_q, max_k = layout.varlen()
    query_THD = query_BHTD[0].transpose(0, 1)
    key_KGD, value_KGD = (x[0].index_select(1, key_index).transpose(0, 1) for x in (key_BGTD, value_BGTD))
    output_THD = kernel(query_THD, key_KGD, value_KGD, cu_q, cu_k, max_q, max_k, scale)
    return output_THD.transpose(0, 1).unsqueeze(0)


def _as_attention_interface(attend: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, None]]:
    """Give a backend the signature that transformers calls: layer, q, k, v, mask, then keywords."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        row_layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if row_layout is None or attention_mask is not None:
            raise RuntimeError("packed attention takes a row_layout and no attention_mask")
        if dropout:
            raise RuntimeError("packed attention has no attention dropout: set disable_dropout")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, row_layout, scale).transpose(1, 2).contiguous(), None

    return forward


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "sdpa": _sdpa,
    "varlen": partial(varlen_attention, kernel=_torch_varlen),
    "flash_attention_2": partial(varlen_attention, kernel=_flash_attn_varlen),
}

for _name, _backend in BACKENDS.items():
    AttentionInterface.register(PREFIX + _name, _as_attention_interface(_backend))


def choose(attn_implementation: str, device: torch.device, bf16: bool) -> str:
    """The name under which transformers finds the backend for a run.

    Raises:
        ConfigError: a backend that needs CUDA and bf16 was asked for without them.
    """
    if attn_implementation == "auto":
        attn_implementation = "varlen" if device.type == "cuda" and bf16 else "sdpa"
    if attn_implementation != "sdpa" and not (device.type == "cuda" and bf16):
        raise ConfigError(
            f"attn_implementation {attn_implementation} needs CUDA and bf16, this run is on {device.type} in "
            f"{'bf16' if bf16 else 'fp32'}: use attn_implementation auto or sdpa"
        )
    return PREFIX + attn_implementation


def check_supported(config: PretrainedConfig, max_length: int, disable_dropout: bool) -> None:
    """Refuse models whose attention is more than causal softmax attention within max_length.

    Raises:
        ConfigError: sliding windows shorter than max_length, soft-capped scores, attention dropout or encoders.
    """
    problems = []
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", window is not None)
    if window and windowed and window < max_length:
        problems.append(
            f"the model attends over windows of {window} tokens, which packed rows do not support: set max_length "
            f"to {window} or less"
        )
    if getattr(config, "attn_logit_softcapping", None):
        problems.append(
            "the model caps its attention scores (attn_logit_softcapping), which packed rows do not support"
        )
    if config.is_encoder_decoder:
        problems.append("the model is an encoder-decoder; packed rows need a decoder-only model")
    if not disable_dropout and any(getattr(config, key, 0.0) for key in ("attention_dropout", "attn_pdrop")):
        problems.append("the model has attention dropout, which packed rows do not support: set disable_dropout: true")
    if problems:
        raise ConfigError(problems)
