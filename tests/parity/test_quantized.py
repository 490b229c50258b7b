"""Quantized layers against plain ones that hold the dequantized values, for every family that we train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dsdpo.compat import quantization_state, unpacked_shape
from dsdpo.model.adapters import add_lora
from dsdpo.model.attention.register import NAMES
from dsdpo.model.quantized import dequantize_in_forward, dequantized
from dsdpo.plan.shape import ModelShape
from tests.dist.grid import run_config
from tests.helpers.quantized import KINDS, NF4, load_quantized, quantized_layers
from tests.helpers.tiny import FAMILIES, save_model, tiny_llama_config
from tests.parity.test_families import PAIRS, packed, tiny_model

UNQUANTIZED = ("lm_head", "embed_out")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model(tmp_path / "llama", tiny_llama_config(tied=False))
    return tmp_path / "llama"


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_computes_with_the_dequantized_values(kind: str, tmp_path: Path) -> None:
    """Log-probs of packed rows; all linear layers but the head are quantized, and nothing else is."""
    plain = tiny_model(kind)
    plain.save_pretrained(tmp_path)
    plain.set_attn_implementation(NAMES["sdpa"])
    before = packed(plain, PAIRS, share_prefix=True).detach()
    linear = {name for name, module in plain.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    for quantization in (NF4, KINDS["int8"]):
        model = load_quantized(tmp_path, quantization, attn_implementation=NAMES["sdpa"])
        layers = quantized_layers(model)
        assert layers.keys() == {name for name in linear if name not in UNQUANTIZED}
        assert ModelShape.from_module(model).total == sum(p.numel() for p in plain.parameters())
        with torch.no_grad():
            for name, layer in layers.items():
                own = plain.get_submodule(name)
                value = dequantized(layer.weight, quantization_state(layer.weight))
                assert tuple(value.shape) == unpacked_shape(layer.weight)
                own.weight.copy_(value.T if isinstance(own, Conv1D) else value)
        expected = packed(plain, PAIRS, share_prefix=True)
        assert (expected - before).abs().max() > 1e-3, "quantization must change something to prove anything"
        torch.testing.assert_close(packed(model, PAIRS, share_prefix=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_leaves_the_training_as_it_was(
    llama: Path, tmp_path: Path, name: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    """In eval mode without gradients the same log-probs to the bit, and then the same gradients as before.

    bitsandbytes itself repacks 4-bit weights in such a pass, on CPUs with AVX512-BF16, and rounds its input for 8 bits.
    """
    base = load_quantized(llama, KINDS[name], dtype, attn_implementation=NAMES["sdpa"])
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = add_lora(base, run_config(str(llama), tmp_path, finetuning_type="lora"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.full_like(parameter, 0.05))

    def look() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = packed(model.train(), PAIRS, share_prefix=True)
        model.zero_grad()
        (logps * torch.linspace(-1.0, 1.0, len(logps))).sum().backward()
        return logps.detach(), {name: p.grad.clone() for name, p in trained.items()}

    logps, before = look()
    with torch.no_grad():
        evaluated = packed(model.eval(), PAIRS, share_prefix=True)
    assert torch.equal(evaluated, logps)
    again, after = look()
    assert torch.equal(again, logps)
    assert all(gradient.norm() > 0 for gradient in before.values())
    assert all(torch.equal(after[name], before[name]) for name in before)


def layers_of(weight: torch.Tensor, bias: torch.Tensor) -> list[nn.Module]:
    """Of 4 and of 8 bits, with these values."""
    import bitsandbytes as bnb

    four = bnb.nn.Linear4bit(64, 48, quant_type="nf4", quant_storage=torch.float32)
    four.weight = bnb.nn.Params4bit(weight, quant_type="nf4", quant_storage=torch.float32, module=four).to("cpu")
    eight = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    for layer in (four, eight):
        layer.bias = nn.Parameter(bias, requires_grad=False)
        dequantize_in_forward(layer)
    return [four, eight]


def gradient(inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
    assert inputs.grad is not None
    return inputs.grad


def test_the_gradient_is_that_of_the_dequantized_layer() -> None:
    """Of the input of a layer with a bias; and nothing but the parameter is kept for it, which ZeRO-3 empties after the
    forward pass and fills again before the backward pass: here with other values, to see which are used."""
    torch.manual_seed(0)
    weight, bias, other = torch.randn(48, 64), torch.randn(48), torch.randn(48, 64)
    for layer, another in zip(layers_of(weight, bias), layers_of(other, bias)):
        state = quantization_state(layer.weight)
        found, refilled, plain, plain_refilled = (torch.randn(2, 3, 64).requires_grad_() for _ in range(4))
        plain.data, plain_refilled.data = found.data.clone(), refilled.data.clone()
        value = dequantized(layer.weight, state).float()
        output, expected = layer(found), nn.functional.linear(plain, value, bias)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradient(found, output), gradient(plain, expected))

        output = layer(refilled)
        layer.weight.data = another.weight.data
        value = dequantized(another.weight, state).float()
        torch.testing.assert_close(
            gradient(refilled, output), gradient(plain_refilled, nn.functional.linear(plain_refilled, value, bias))
        )
