"""Quantized models and the plain ones that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dsdpo.compat import quantization_state
from dsdpo.config.quantization import Quantization
from dsdpo.model.quantized import bitsandbytes_config, dequantize_in_forward, dequantized

NF4 = Quantization(4, "nf4", True)
KINDS = {"nf4": NF4, "fp4, single": Quantization(4, "fp4", False), "int8": Quantization(8, "nf4", True)}


def load_quantized(
    folder: Path, quantization: Quantization, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """A language model with quantized linear layers that compute as in a run."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=bitsandbytes_config(quantization, dtype), **settings
    )
    dequantize_in_forward(model)
    return model


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> quantized layer."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: layer for name, layer in found if quantization_state(layer.weight) is not None}


def save_dequantized(source: Path, to: Path, quantization: Quantization) -> None:
    """The values of a quantized language model's weights as an ordinary folder, fp32."""
    values = {
        f"{name}.weight": dequantized(layer.weight, quantization_state(layer.weight)).float()
        for name, layer in quantized_layers(load_quantized(source, quantization)).items()
    }
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert values and values.keys() < plain.state_dict().keys()
    plain.load_state_dict(values, strict=False)
    plain.save_pretrained(to)
