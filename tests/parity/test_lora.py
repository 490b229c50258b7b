"""LoRA as one operation against PEFT's own forward, for every family that we train."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsdpo.model.attention.register import NAMES
from dsdpo.model.lora import fuse_lora
from tests.helpers.tiny import FAMILIES
from tests.parity.test_families import PAIRS, difference, packed, tiny_model


def adapted(model: PreTrainedModel) -> Any:
    """With an adapter on all linear layers that changes what they compute."""
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return tuned.train()


def computed(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs [C] of packed pairs, and the gradients of the adapter."""
    model.zero_grad()
    logps = packed(model, PAIRS, share_prefix=True)
    (logps * torch.linspace(-1.0, 1.0, len(logps), device=logps.device)).sum().backward()
    return logps.detach(), {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_computes_what_peft_does(kind: str) -> None:
    """And takes every output that was computed with another's."""
    base = tiny_model(kind)
    base.set_attn_implementation(NAMES["sdpa"])
    theirs = adapted(base)
    ours = copy.deepcopy(theirs)
    layers = [module for module in ours.modules() if hasattr(module, "lora_A")]
    assert fuse_lora(ours) == len([layer for layer in layers if not isinstance(layer.base_layer, Conv1D)])
    (found, gradients), (expected, wanted) = computed(ours), computed(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert difference(gradients, wanted)[0] < 1e-4
    blocks = {layer.fused_block for layer in layers if hasattr(layer, "fused_block")}
    assert not any(block._waiting for block in blocks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", FAMILIES)
def test_on_cuda_in_bf16(kind: str) -> None:
    """Within twice PEFT's own error against fp32."""
    base = tiny_model(kind)
    base.set_attn_implementation(NAMES["sdpa"])
    theirs = adapted(base).cuda()
    exact, wanted = computed(theirs)
    own, own_gradients = computed(theirs.bfloat16())
    fuse_lora(theirs)
    found, gradients = computed(theirs)
    assert (found - exact).norm() < 2 * (own - exact).norm()
    assert difference(gradients, wanted)[0] < 2 * difference(own_gradients, wanted)[0]
