"""Frozen base weights in 4 or 8 bits, quantized by bitsandbytes as they are loaded, and how layers compute with them.

A layer's weights are dequantized to the run's precision and multiplied with its input: the same in training and in
evaluation, on CPU and GPU, whatever else is in the micro-batch. bitsandbytes' own forward passes are not: on CPUs with
AVX512-BF16 one in eval mode repacks 4-bit weights for good, and later ones have no gradient. With 8 bits they round the
input too, on a CPU in eval mode alone, and treat columns apart in which any token of the micro-batch is an outlier. And
they keep a gathered weight from the forward to the backward pass, where ZeRO-3 is to release it.
"""

from __future__ import annotations

import importlib.metadata
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import BitsAndBytesConfig

from dsdpo.compat import quantization_state
from dsdpo.config.quantization import Quantization
from dsdpo.config.rules import HEAD_NAMES

_UNQUANTIZED = [*HEAD_NAMES, "score"]


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to quantize a model while it loads it.

    Args:
        dtype: that layers compute in. Packed weights have it too, since ZeRO-3 shards nothing but floating point.
    """
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_UNQUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=_UNQUANTIZED,
    )


def quantization_identity(quantization: Quantization, device: torch.device) -> str:
    """What decides the values of a quantized model beside its weights, in words."""
    kind = f"{quantization.kind}{' with double quantization' if quantization.double else ''}"
    version = importlib.metadata.version("bitsandbytes")
    return f"{'int8' if quantization.bits == 8 else kind}, bitsandbytes {version} on {device.type}"


def dequantize_in_forward(model: nn.Module) -> None:
    """Let the quantized linear layers of a model compute as this module says."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and quantization_state(module.weight) is not None:
            hooked = hasattr(module, "_old_forward")  # by accelerate, where a model lies on several GPUs
            setattr(module, "_old_forward" if hooked else "forward", MethodType(_forward, module))


def dequantized(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """The values that a weight quantized by bitsandbytes stands for; `state` as `quantization_state` gives it."""
    from bitsandbytes import functional

    assert weight.numel() > 0, "the weight is in pieces: its layer has not been gathered"
    if not hasattr(state, "absmax"):
        return functional.int8_vectorwise_dequant(weight.data, state)
    return functional.dequantize_4bit(weight.data, state)


def _forward(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _FrozenLinear.apply(inputs, layer.weight, layer.bias, quantization_state(layer.weight))
    return found


class _FrozenLinear(torch.autograd.Function):
    """inputs @ weight.T + bias for a weight and a bias that are not trained."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: Any
    ) -> torch.Tensor:
        """Save the parameter itself, which ZeRO-3 empties and fills again until the backward pass."""
        ctx.save_for_backward(weight)
        ctx.state = state
        return functional.linear(inputs, dequantized(weight, state).to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Dequantize again instead of keeping what was 4 or 8 bits in 16 or 32."""
        (weight,) = ctx.saved_tensors
        return grad @ dequantized(weight, ctx.state).to(grad.dtype), None, None, None
