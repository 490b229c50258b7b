"""The choice of kernels, and that they are put on one model alone."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dsdpo.errors import ConfigError
from dsdpo.model.attention.register import NAMES
from dsdpo.model.kernels import apply_kernels, choose_kernels, decoder_layers
from dsdpo.model.liger import _INTERLEAVED, on_copies, use_rope
from dsdpo.model.recompute import recompute_layers
from dsdpo.model.support import LIGER
from dsdpo.plan.memory import Recompute
from tests.helpers.tiny import FAMILIES

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}


def tiny(kind: str) -> Any:
    more = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more))


def test_auto_is_liger_where_it_runs() -> None:
    assert choose_kernels("auto", "llama", cuda=True, liger=True) == "liger"
    assert choose_kernels("auto", "llama", cuda=True, liger=False) == "none"
    assert choose_kernels("auto", "llama", cuda=False, liger=True) == "none"
    assert choose_kernels("auto", "gpt2", cuda=True, liger=True) == "none"
    for asked in ("compile", "none"):
        assert choose_kernels(asked, "gpt2", cuda=False, liger=False) == asked  # type: ignore[arg-type]
    assert choose_kernels("liger", "qwen3", cuda=True, liger=True) == "liger"


@pytest.mark.parametrize(
    ("kind", "cuda", "liger", "code"),
    [
        ("llama", False, True, "no-cuda"),
        ("llama", True, False, "liger-missing"),
        ("gpt2", True, True, "model-kernels"),
    ],
)
def test_liger_that_cannot_run_is_an_error(kind: str, cuda: bool, liger: bool, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_kernels("liger", kind, cuda, liger)
    assert [(problem.code, problem.option) for problem in caught.value.problems] == [(code, "kernels")]


@pytest.mark.parametrize("kind", sorted(LIGER - _INTERLEAVED))
def test_rotary_positions_of_one_model_alone(kind: str) -> None:
    """The attention of this transformers calls what `use_rope` gives it; other models keep transformers' function."""
    model, other = tiny(kind), tiny(kind)
    modeling = importlib.import_module(type(model).__module__)
    own, calls = modeling.apply_rotary_pos_emb, []

    def rope(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        return own(*args, **keywords)

    attention = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert len(attention) == 1
    use_rope(attention[0], rope)
    ids = torch.arange(6)[None]
    found, others = model(ids).logits, other(ids).logits
    assert len(calls) == 1 and modeling.apply_rotary_pos_emb is own
    other.load_state_dict(model.state_dict())
    assert torch.equal(found, other(ids).logits) and not torch.equal(found, others)


class TurnsInPlace(torch.autograd.Function):
    """Rotary positions written where queries and keys lie, out of autograd's sight, as Liger's kernel does."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        laid = [x.transpose(1, 2).contiguous() for x in (query, key)]
        for x, turned in zip(laid, apply_rotary_pos_emb(*laid, cos, sin, unsqueeze_dim=2)):
            x.data.copy_(turned)
        return tuple(x.transpose(1, 2) for x in laid)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return (*apply_rotary_pos_emb(*gradients, cos, -sin), None, None)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_rope_in_place_goes_with_recomputation(recompute: Recompute) -> None:
    wanted, model = (tiny("llama").train() for _ in range(2))
    model.load_state_dict(wanted.state_dict())
    recompute_layers(model, recompute)
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            use_rope(module, on_copies(TurnsInPlace.apply))
    ids = torch.arange(6)[None]
    for each in (wanted, model):
        each(ids, labels=ids).loss.backward()
    torch.testing.assert_close(
        {name: p.grad for name, p in model.named_parameters()}, {name: p.grad for name, p in wanted.named_parameters()}
    )


@pytest.mark.parametrize("kind", sorted(LIGER))
def test_what_liger_replaces_is_there(kind: str) -> None:
    """Norms with an epsilon under one of two names and a weight, and gated MLPs."""
    modules = {type(module).__name__: module for module in tiny(kind).modules()}
    norms = [module for name, module in modules.items() if name.endswith("RMSNorm")]
    assert norms and all(hasattr(norm, "variance_epsilon") or hasattr(norm, "eps") for norm in norms)
    mlps = [module for name, module in modules.items() if name.endswith("MLP")]
    assert len(mlps) == 1 and (hasattr(mlps[0], "gate_up_proj") or hasattr(mlps[0], "gate_proj"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_type_has_layers_to_compile(kind: str) -> None:
    names = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
        "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    }
    config = AutoConfig.for_model(kind)
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, **names.get(kind, {})}
    config = AutoConfig.for_model(kind, **{k: v for k, v in sizes.items() if hasattr(config, k) or k == "head_dim"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model)
    assert len(layers) == config.num_hidden_layers
    apply_kernels(model, "none")
    assert all("forward" not in vars(layer) for layer in layers)
    apply_kernels(model, "compile")
    assert all("forward" in vars(layer) for layer in layers)


def test_attention_stays_outside_of_a_graph() -> None:
    from transformers import AttentionInterface

    for name in NAMES.values():
        assert getattr(AttentionInterface()[name], "_torchdynamo_disable", False)
