"""Our backends as attention functions that transformers calls in place of its own, and the choice among them.

`PackedLayout` travels to every attention layer as the model keyword `packed_layout`. No mask function is registered
under our names, so transformers builds no mask and never guesses document borders from position ids.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from transformers import AttentionInterface

from dsdpo.config.precision import Precision
from dsdpo.config.rules import missing_flash_package
from dsdpo.errors import config_error
from dsdpo.model.attention.backends import BACKENDS, VARLEN_KERNELS, Backend
from dsdpo.model.attention.masks import PackedLayout
from dsdpo.model.attention.names import NAMES

# Keywords of transformers' attention calls that change no result here: ids are rotated into the queries and keys
# before, and caches and outputs of scores are never asked for.
_WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}


def register(name: str, attend: Backend) -> None:
    """Let transformers find a backend: models load with `attn_implementation=name`."""

    @torch.compiler.disable  # a compiled layer leaves its graph here: a row's layout is never traced
    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        packed_layout: PackedLayout | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """What each attention layer calls: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
        if packed_layout is None or attention_mask is not None:
            raise RuntimeError("packed attention takes a packed_layout and no attention_mask")
        if dropout:
            raise RuntimeError("packed attention has no attention dropout: set disable_dropout")
        _refuse_unknown(module, packed_layout, others)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, packed_layout, scale).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)


def _refuse_unknown(module: torch.nn.Module, layout: PackedLayout, others: dict[str, Any]) -> None:
    """Attention sinks, soft caps, biases, windows and the like arrive as keywords: refuse what we do not compute.

    Raises:
        ConfigError: a keyword that would change the result.
    """
    given = {name: value for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT}
    causal = given.pop("is_causal", getattr(module, "is_causal", True))
    window = given.pop("sliding_window", None)
    if given or not causal or (window is not None and window < layout.longest):
        found = sorted(given) or ("sliding_window" if causal else "is_causal=False")
        raise config_error(
            "model-attention",
            "model_name_or_path",
            f"{type(module).__name__} asks for more than causal attention over the whole sequence: {found}. Packed "
            "rows do not compute that; train another model",
        )


for _backend, _name in NAMES.items():
    register(_name, BACKENDS[_backend])


Capability: TypeAlias = tuple[int, int]
_AMPERE: Capability = (8, 0)


def choose(attn_implementation: str, precision: Precision, capability: Capability | None) -> str:
    """The name under which transformers finds the backend for a run.

    Args:
        capability: compute capability of the weakest of the run's GPUs; None without CUDA.

    Raises:
        ConfigError: the backend's device, precision or package is not there.
    """
    runs_varlen = capability is not None and capability >= _AMPERE and precision != "fp32"
    if attn_implementation == "auto":
        attn_implementation = "varlen" if runs_varlen else "sdpa"
    wanted = f"attn_implementation {attn_implementation}"
    if capability is None and attn_implementation != "sdpa":
        text = f"{wanted} needs CUDA, and this run is on CPUs: use auto or sdpa"
        raise config_error("no-cuda", "attn_implementation", text)
    if attn_implementation in VARLEN_KERNELS and not runs_varlen:
        found = ".".join(map(str, capability or ()))
        text = (
            f"{wanted} needs bf16 or fp16 on GPUs of compute capability 8.0 (Ampere) or higher; this run is in "
            f"{precision}, on a GPU of {found}: use auto or sdpa"
        )
        raise config_error("attention-gpu", "attn_implementation", text)
    if missing := missing_flash_package(attn_implementation):
        raise config_error("attention", "attn_implementation", missing)
    return NAMES[attn_implementation]
