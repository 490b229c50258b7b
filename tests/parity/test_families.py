"""Packed against transformers' own computation: padded batches and eager attention, for every family we train."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dsdpo.config.rules import missing_flash_package
from dsdpo.data.example import TokenizedExample
from dsdpo.data.packing import build_micro_batch
from dsdpo.model.attention.backends import varlen_attention
from dsdpo.model.attention.register import NAMES, register
from dsdpo.model.packed import PackedInputs, PackedModel
from dsdpo.model.recompute import recompute_layers
from dsdpo.model.support import check_supported
from tests.helpers.tiny import FAMILIES, VOCAB, random_pairs
from tests.helpers.varlen import varlen_in_plain_torch

CPU = torch.device("cpu")
VARLEN_ON_CPU = "varlen_in_plain_torch"
register(VARLEN_ON_CPU, partial(varlen_attention, kernel=varlen_in_plain_torch))
PAIRS = random_pairs(3, seed=1)
LONGEST = max(len(pair.prompt_ids) + max(map(len, pair.completion_ids)) for pair in PAIRS)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in FAMILIES},
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with idle settings": ("llama", {"logit_scale": 0.5, "logits_scaling": 2.0, "final_logit_softcapping": 1.0}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt2 unscaled": ("gpt2", {"scale_attn_weights": False}),
    "mistral windowed": ("mistral", {"sliding_window": LONGEST}),
    "qwen2 windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": LONGEST, "max_window_layers": 1}),
    "gemma3_text capped": ("gemma3_text", {"final_logit_softcapping": 3.0}),
    "granite scaled": (
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
        },
    ),
    "cohere scaled": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "phi with normed queries": ("phi", {"qk_layernorm": True}),
    "phi3 longrope": (
        "phi3",
        {
            "original_max_position_embeddings": LONGEST,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": LONGEST,
            },
        },
    ),
}


def tiny_model(name: str) -> PreTrainedModel:
    """Random weights, all different from their special initial values, so that no bias or norm is idle."""
    kind, changes = MODELS[name]
    default = AutoConfig.for_model(kind)
    known = {key: value for key, value in SIZES.items() if hasattr(default, key) or key == "head_dim"}
    dropouts = {key: 0.0 for key, v in default.to_dict().items() if "drop" in key and isinstance(v, float)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**known, **dropouts, **changes})
    check_supported(config, LONGEST, disable_dropout=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def plain(model: PreTrainedModel, pairs: list[TokenizedExample]) -> torch.Tensor:
    """Log-probs of all completion tokens, [C], from the logits of one right-padded batch."""
    sequences = [np.concatenate([pair.prompt_ids, answer]) for pair in pairs for answer in pair.completion_ids]
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(s) for s in sequences], batch_first=True).to(model.device)
    lengths = torch.tensor([len(s) for s in sequences], device=model.device)
    mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(2, ids[:, 1:, None])[..., 0]
    starts = [len(pair.prompt_ids) - 1 for pair in pairs for _ in pair.completion_ids]
    return torch.cat([logps[i, start : len(s) - 1] for i, (start, s) in enumerate(zip(starts, sequences))])


def packed(model: PreTrainedModel, pairs: list[TokenizedExample], share_prefix: bool) -> torch.Tensor:
    """The same from one packed micro-batch, [C]."""
    micro_batch = build_micro_batch(pairs, range(len(pairs)), share_prefix)
    logps = PackedModel(model)(PackedInputs.of(micro_batch, model.device)).token_logps
    assert logps is not None
    return logps


def gradients(model: PreTrainedModel, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum that weighs every token differently, by parameter name."""
    model.zero_grad()
    (logps * torch.linspace(-1.0, 1.0, len(logps), device=logps.device)).sum().backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference in norm, and its parameter.

    Some gradients are 0 but for rounding (a bias on the keys moves no softmax): below 1e-3 of the largest norm a
    difference counts against that.
    """
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())
    assert found.keys() == expected.keys()
    return max(((found[n] - g).norm().item() / max(g.norm(), floor).item(), n) for n, g in expected.items())


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture
def flex_trains_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a FlexAttention backward on CPU; its uncompiled one computes it all the same."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


ON_CPU = [NAMES["sdpa"], NAMES["flex_attention"], VARLEN_ON_CPU]


def test_log_probs_and_gradients_match(model: PreTrainedModel, flex_trains_on_cpu: None) -> None:
    """Every backend that runs here, with the prompt shared and not."""
    expected = plain(model, PAIRS)
    wanted = gradients(model, expected)
    for backend in ON_CPU:
        model.set_attn_implementation(backend)
        for share_prefix in (True, False):
            found = packed(model, PAIRS, share_prefix)
            off = ((found - expected).abs() / expected.abs()).max().item()
            assert off < 1e-5, f"{backend}, share_prefix={share_prefix}: log-probs differ by {off:.1e}"
            off, name = difference(gradients(model, found), wanted)
            assert off < 1e-4, f"{backend}, share_prefix={share_prefix}: the gradient of {name} differs by {off:.1e}"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradient_checkpointing_changes_nothing(recompute: Literal["selective", "full"]) -> None:
    model = tiny_model("llama")
    expected = plain(model, PAIRS)
    wanted = gradients(model, expected)
    model.set_attn_implementation(NAMES["sdpa"])
    recompute_layers(model, recompute)
    found = packed(model.train(), PAIRS, share_prefix=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert difference(gradients(model, found), wanted)[0] < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", [name for name in NAMES if name != "sdpa"])
def test_on_cuda_in_bf16(model: PreTrainedModel, backend: str) -> None:
    """As near to fp32 eager as eager itself in bf16, within a factor of 2."""
    if missing := missing_flash_package(backend):
        pytest.skip(missing)
    exact = plain(model.cuda(), PAIRS)
    wanted = gradients(model, exact)
    rounded = plain(model.bfloat16(), PAIRS)
    logps_off, gradients_off = (rounded - exact).norm(), difference(gradients(model, rounded), wanted)[0]
    model.set_attn_implementation(NAMES[backend])
    for share_prefix in (True, False):
        found = packed(model, PAIRS, share_prefix)
        assert (found - exact).norm() < 2 * logps_off
        assert difference(gradients(model, found), wanted)[0] < 2 * gradients_off


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_on_cuda_in_fp32(backend: str) -> None:
    model = tiny_model("llama").cuda()
    expected = plain(model, PAIRS)
    wanted = gradients(model, expected)
    model.set_attn_implementation(NAMES[backend])
    for share_prefix in (True, False):
        found = packed(model, PAIRS, share_prefix)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert difference(gradients(model, found), wanted)[0] < 1e-3
