"""What of a decoder layer is computed again in the backward pass, instead of being kept since the forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1}  # -> the place of the left factor among the arguments
_ATTENTION = ("::_scaled_dot_product_", "::_varlen_attn", "::_flash_attn", "::flash_attn", "::_efficient_attention")
_THIN = 10  # a product whose result is so many times wider than its inner dimension is that of LoRA's second matrix


def recompute_layers(model: PreTrainedModel, recompute: Literal["none", "selective", "full"]) -> None:
    """Let the decoder layers of a model in training compute again what `gradient_checkpointing` says.

    Each layer's `forward` is replaced, so DeepSpeed's hooks stay outside: under ZeRO-3 the layer's backward pass has
    gathered its weights when they are needed again.
    """
    if recompute == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(settings)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operation.name(), args) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operation: str, args: tuple[Any, ...]) -> bool:
    """Whether `selective` keeps the result of an operation: attention, and products with a weight matrix.

    LoRA's second product is as wide as the layer's own, which is kept, and costs next to nothing.
    """
    left = _PRODUCTS.get(operation)
    if left is None:
        return any(part in operation for part in _ATTENTION)
    return bool(args[left + 1].shape[1] <= _THIN * args[left].shape[1])
