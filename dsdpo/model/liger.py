"""Liger's Triton kernels for RMSNorm, SwiGLU or GeGLU, and rotary positions, on the modules of one model.

Liger's own patches replace classes and functions of transformers for the whole process. Here each module gets a forward
of its own. Liger's fused head is not used: it computes the head's weight gradient even where the head is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

_ROPE = "apply_rotary_pos_emb"  # as every modeling file of transformers calls it


class _Norm(NamedTuple):
    """How a family's RMSNorm computes, in Liger's words.

    Attributes:
        offset: added to the weight.
        casting_mode: `llama` rounds before the product with the weight, `gemma` after it.
        in_place: whether the gradient of the output may be overwritten: not where the norm's output is added to the
            residual stream, which has the same gradient.
    """

    offset: float = 0.0
    casting_mode: str = "llama"
    in_place: bool = True


_NORMS = {
    "exaone4": _Norm(in_place=False),
    "gemma": _Norm(1.0, "gemma"),
    "gemma3_text": _Norm(1.0, "gemma", in_place=False),
    "glm4": _Norm(in_place=False),
    "olmo2": _Norm(casting_mode="gemma", in_place=False),
    "olmo3": _Norm(casting_mode="gemma", in_place=False),
}
_INTERLEAVED = {"glm4"}  # turns neighbours instead of halves; Liger has no kernel for that


def use_liger(model: PreTrainedModel) -> None:
    """Let a model of a type in `support.LIGER` compute with Liger's kernels."""
    from liger_kernel.transformers import LigerRMSNorm, liger_rotary_pos_emb

    kind = model.config.model_type
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            _use_norm(module, _NORMS.get(kind, _Norm()), LigerRMSNorm.forward)
        elif name.endswith("MLP") and (forward := _mlp_forward(module)):
            module.forward = MethodType(forward, module)
        elif name.endswith("Attention") and kind not in _INTERLEAVED:
            use_rope(module, on_copies(liger_rotary_pos_emb))


def _use_norm(module: Any, norm: _Norm, forward: Callable[..., Any]) -> None:
    module.variance_epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    module.offset, module.casting_mode, module.in_place = norm
    module.row_mode = None  # Liger decides by the number of rows
    module.forward = MethodType(forward, module)


def _mlp_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Liger's forward for the activation of a gated MLP; None where it has none."""
    from liger_kernel.transformers import LigerGEGLUMLP, LigerPhi3SwiGLUMLP, LigerSwiGLUMLP

    config: Any = module.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if hasattr(module, "gate_up_proj"):
        return LigerPhi3SwiGLUMLP.forward if activation in ("silu", "swish") else None
    if activation in ("silu", "swish"):
        return LigerSwiGLUMLP.forward
    return LigerGEGLUMLP.forward if activation == "gelu_pytorch_tanh" else None


def use_rope(attention: Any, rope: Callable[..., Any]) -> None:
    """Let one attention layer turn its queries and keys with `rope`, which transformers reads from a module's globals:
    the layer gets the same forward over a copy of these."""
    forward = unwrap(type(attention).forward)  # transformers 5.24 wraps it to take earlier names of its arguments
    assert _ROPE in forward.__code__.co_names, f"{type(attention)} does not call {_ROPE}"
    attention.forward = MethodType(_with_rope(forward, rope), attention)


@cache
def on_copies(rope: Callable[..., Any]) -> Callable[..., Any]:
    """A `rope` that turns queries and keys where they lie, for selective checkpointing too: it keeps what their
    projections gave, does not see what a kernel writes there, and would have turned ones turned again."""

    def turned(query: torch.Tensor, key: torch.Tensor, *more: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():
            query, key = query.clone(), key.clone()
        return rope(query, key, *more)

    return turned


@cache
def _with_rope(forward: FunctionType, rope: Callable[..., Any]) -> FunctionType:
    names = {**forward.__globals__, _ROPE: rope}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
