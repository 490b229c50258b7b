"""Layers with Liger's kernels and compiled layers beside transformers' own: log-probs, gradients, recompilations."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from dsdpo.config.kernels import missing_liger
from dsdpo.model.attention.register import NAMES
from dsdpo.model.kernels import apply_kernels
from dsdpo.model.recompute import recompute_layers
from dsdpo.model.support import COMPARED, LIGER
from dsdpo.plan.memory import RECOMPUTE, Recompute
from tests.helpers.tiny import random_pairs
from tests.parity.test_families import PAIRS, VARLEN_ON_CPU, difference, gradients, packed, plain, tiny_model

LIGER_MODELS = [*sorted(LIGER), "llama biased", "llama3 rope", "granite scaled", "mistral windowed", "phi3 longrope"]
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Nothing is compiled yet, and nothing stays so."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were compiled since `compiled_anew`."""
    return counters["stats"]["unique_graphs"]


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with adapters in it that change what it computes."""
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


def trained(model: PreTrainedModel, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of what is trained."""
    model.zero_grad()
    (logps * torch.linspace(-1.0, 1.0, len(logps))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def recomputing(model: PreTrainedModel, recompute: Recompute) -> PreTrainedModel:
    recompute_layers(model, recompute)
    return model.train()


@pytest.mark.parametrize(
    ("name", "lora", "recompute"),
    [
        ("llama", True, "full"),
        pytest.param("llama", False, "none", marks=pytest.mark.slow),
        pytest.param("llama", True, "selective", marks=pytest.mark.slow),
        pytest.param("gemma3_text", False, "full", marks=pytest.mark.slow),
        pytest.param("qwen2", True, "none", marks=pytest.mark.slow),
        pytest.param("gpt2 scaled by layer", False, "none", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_on_cpu(name: str, lora: bool, recompute: Recompute, compiled_anew: None) -> None:
    """They compute the same, and of 30 rows of different shape none after the third compiles anything."""
    model = tiny_model(name)
    model.set_attn_implementation(NAMES["sdpa"])
    model = with_lora(model) if lora else model
    model = recomputing(model, recompute)
    expected = packed(model, PAIRS, True)
    wanted = trained(model, expected)
    apply_kernels(model, "compile")
    found = packed(model, PAIRS, True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    off, worst = difference(trained(model, found), wanted)
    assert off < 1e-4, f"the gradient of {worst} differs by {off:.1e}"
    compiled = []
    for row in range(30):
        pairs = random_pairs(1 + row % 5, seed=row)
        trained(model, packed(model, pairs, share_prefix=row % 2 == 0))
        compiled.append(graphs())
    assert compiled[2] == compiled[-1] > 0, compiled


def paths() -> list[Any]:
    """Every kernel path that CUDA runs."""
    own = [("liger", name, backend) for name in LIGER_MODELS for backend in ("varlen", "sdpa")]
    return own + [("compile", name, "varlen") for name in ("llama", "gemma3_text", "qwen2", "gpt2", "phi")]


@pytest.mark.parametrize(
    ("kernels", "name", "backend"), [pytest.param(*path, marks=on_cuda, id=" ".join(path)) for path in paths()]
)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_on_cuda_in_bf16(kernels: Any, name: str, backend: str, recompute: Recompute, compiled_anew: None) -> None:
    """As near to fp32 eager as eager itself in bf16, within a factor of 2."""
    if kernels == "liger" and (missing := missing_liger()):
        pytest.skip(missing)
    model = tiny_model(name).cuda()
    exact = plain(model, PAIRS)
    wanted = gradients(model, exact)
    rounded = plain(model.bfloat16(), PAIRS)
    logps_off, gradients_off = (rounded - exact).norm(), difference(gradients(model, rounded), wanted)[0]
    model.set_attn_implementation(NAMES[backend])
    model = recomputing(model, recompute)
    apply_kernels(model, kernels)
    found = packed(model, PAIRS, True)
    assert (found - exact).norm() < 2 * logps_off
    assert difference(gradients(model, found), wanted)[0] < 2 * gradients_off


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As `deterministic: true` has it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", [NAMES["sdpa"], VARLEN_ON_CPU])
def test_a_row_needs_no_operation_without_a_fixed_order(backend: str, deterministic: None) -> None:
    """torch refuses such ones."""
    model = tiny_model("llama")
    model.set_attn_implementation(backend)
    one, other = (gradients(model, packed(model, PAIRS, True)) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kernels", ["liger", "none"])
def test_deterministic_gradients_repeat_on_cuda(kernels: Any, deterministic: None) -> None:
    """The same bits from the same model and row."""
    if kernels == "liger" and (missing := missing_liger()):
        pytest.skip(missing)
    model = tiny_model("llama").cuda().bfloat16()
    model.set_attn_implementation(NAMES["varlen"])
    apply_kernels(model, kernels)
    pairs = random_pairs(60, seed=3)
    first, second = (packed(model, pairs, True) for _ in range(2))
    assert torch.equal(first, second)
    one, other = (gradients(model, logps) for logps in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(bool(missing_liger()), reason="needs liger-kernel")
def test_liger_changes_no_other_model() -> None:
    """Neither one that is there, nor one that is loaded later."""
    before, changed = tiny_model("llama"), tiny_model("llama")
    apply_kernels(changed, "liger")
    assert any("forward" in vars(module) for module in changed.modules())
    for model in (before, tiny_model("llama")):
        assert all("forward" not in vars(module) for module in model.modules())
    modeling = importlib.import_module(type(before).__module__)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        assert getattr(modeling, name).__module__ == modeling.__name__


def test_every_type_of_liger_is_compared() -> None:
    assert LIGER <= COMPARED
