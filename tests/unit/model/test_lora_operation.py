"""LoRA as one operation, beside PEFT's own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dsdpo.compat import active_adapter, quantization_state
from dsdpo.model import lora
from dsdpo.model.lora import fuse_lora
from dsdpo.model.quantized import dequantize_in_forward

SIZE, TOKENS = 64, 40
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)
DEVICES = ["cpu", GPU]
Computed = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Block(nn.Module):
    """What a decoder layer does with its linear layers, with its names for them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(SIZE, SIZE, bias))
        self.gate_proj, self.up_proj = nn.Linear(SIZE, 2 * SIZE, bias), nn.Linear(SIZE, 2 * SIZE, bias)
        self.down_proj = nn.Linear(2 * SIZE, SIZE, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 0.5
        x = x + self.o_proj(self.q_proj(h) * torch.sigmoid(self.k_proj(h)) + self.v_proj(h))
        h = torch.tanh(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


def adapted(base: nn.Module, **settings: Any) -> Any:
    """`base` with an adapter of PEFT that changes what it computes."""
    found: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": r".*_proj", **settings}
    tuned = peft.inject_adapter_in_model(peft.LoraConfig(**found), base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return tuned


def pair(base: nn.Module | None = None, **settings: Any) -> tuple[Any, Any]:
    """Two equal blocks: one that PEFT computes, one that is fused."""
    torch.manual_seed(0)
    theirs = adapted(base or Block(), **settings)
    ours = copy.deepcopy(theirs)
    assert fuse_lora(ours) == 7
    return theirs, ours


def given(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, TOKENS, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)},
}


def computed(block: nn.Module, inputs: torch.Tensor, scale: float = 1.0, recompute: str | None = None) -> Computed:
    """The output of a block, and gradients of its input and its adapters."""
    inputs = inputs.detach().requires_grad_()
    block.zero_grad()
    output = checkpoint(block, inputs, use_reentrant=False, **RECOMPUTE[recompute]) if recompute else block(inputs)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    ((output.float() * weights).sum() * scale).backward()
    found = {name: p.grad.float() / scale for name, p in block.named_parameters() if p.requires_grad}
    assert inputs.grad is not None
    return output.detach().float(), {**found, "inputs": inputs.grad.float() / scale}


def error(found: Computed, exact: Computed) -> tuple[float, float]:
    """Largest relative errors, in norm, of the output and of a gradient."""
    assert found[1].keys() == exact[1].keys()
    gradients = max(((found[1][name] - g).norm() / g.norm()).item() for name, g in exact[1].items())
    return ((found[0] - exact[0]).norm() / exact[0].norm()).item(), gradients


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call of the operation inside computes."""
    calls: list[int] = []
    compute = lora._compute

    def count(parts: Any, inputs: torch.Tensor) -> Any:
        calls.append(len(parts))
        return compute(parts, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "_compute", count)
        yield calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"rank_pattern": {"k_proj": 2}}, {"use_rslora": True, "lora_alpha": 2}], ids=str
)
def test_it_is_what_peft_computes(
    device: str, bias: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: the output and all gradients, also where a layer has another rank, and so another scale."""
    theirs, ours = (block.to(device) for block in pair(Block(bias), **changes))
    with counted(monkeypatch) as calls:
        found = computed(ours, given().to(device))
    assert calls == [3, 1, 2, 1]
    assert max(error(found, computed(theirs, given().to(device)))) < 1e-5
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_rounds_no_more_than_peft(device: str, dtype: torch.dtype) -> None:
    """Within twice PEFT's own error against fp32 of the same values; fp16 with a loss scale."""
    theirs, ours = (block.to(device, dtype) for block in pair())
    exact = computed(copy.deepcopy(theirs).float(), given(dtype).float().to(device))
    scale = 4.0 if dtype == torch.float16 else 1.0
    own, found = (error(computed(block, given(dtype).to(device), scale), exact) for block in (theirs, ours))
    assert 0 < found[0] < 2 * own[0] and 0 < found[1] < 2 * own[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT computes them with the base layers that a run has."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    base = Block()
    for name, layer in list(base.named_children()):
        shape = layer.in_features, layer.out_features
        if bits == 4:
            quantized: Any = bnb.nn.Linear4bit(*shape, quant_type="nf4", quant_storage=torch.float32)
            weight: Any = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", module=quantized)
        else:
            quantized = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
        quantized.weight, quantized.bias = weight.to("cpu"), layer.bias
        setattr(base, name, quantized)
    base.is_loaded_in_8bit = bits == 8
    dequantize_in_forward(base)
    theirs, ours = pair(base)
    assert quantization_state(ours.q_proj.base_layer.weight) is not None
    with counted(monkeypatch) as calls:
        found = computed(ours, given())
    assert calls == [3, 1, 2, 1]
    assert max(error(found, computed(theirs, given()))) < 1e-5


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"k_proj": 2}}], ids=str)
def test_recomputation_changes_nothing(recompute: str, changes: dict[str, Any]) -> None:
    _, ours = pair(**changes)
    found, expected = computed(ours, given(), recompute=recompute), computed(ours, given())
    assert max(error(found, expected)) < (1e-6 if recompute == "selective" else 1e-12)


def test_layers_that_share_their_input_have_one_gradient_of_it() -> None:
    """One node of the graph gives it, where autograd would add six of them."""
    _, ours = pair()
    inputs = given()
    outputs = [ours.q_proj(inputs), ours.k_proj(inputs), ours.v_proj(inputs)]
    nodes = {output.grad_fn for output in outputs}
    assert len(nodes) == 1
    assert not ours.q_proj.fused_block._waiting and ours.q_proj.fused_block._inputs is None, "nothing is kept"


def add_second(block: Any) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=r".*_proj"), block, adapter_name="second")
    for layer in block.children():
        layer._active_adapter = ["default", "second"]
        for matrices in (layer.lora_A, layer.lora_B):
            matrices.requires_grad_()  # peft 0.19 freezes the first adapter


def add_hooks(block: Any) -> None:
    for layer in block.children():
        layer.base_layer.register_forward_pre_hook(lambda module, args: None)


def train_bias(block: Any) -> None:
    for layer in block.children():
        layer.base_layer.bias.requires_grad_()


def merge(block: Any) -> None:
    for layer in block.children():
        layer.merge()


def base_in_bf16(block: Any) -> None:
    for layer in block.children():
        layer.base_layer.bfloat16()


PEFTS_OWN: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "dropout": ({"lora_dropout": 0.3}, lambda block: None),
    "bias of B": ({"lora_bias": True}, lambda block: None),
    "DoRA": ({"use_dora": True}, lambda block: None),
    "several adapters": ({}, add_second),
    "hooks inside": ({}, add_hooks),
    "trained bias": ({}, train_bias),
    "fp32 adapters": ({}, base_in_bf16),
}


@pytest.mark.parametrize("case", PEFTS_OWN)
def test_elsewhere_peft_computes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and the operation is not called."""
    settings, change = PEFTS_OWN[case]
    results = []
    with counted(monkeypatch) as calls:
        for block in pair(**settings):
            torch.manual_seed(3)
            change(block)
            inputs = given(torch.bfloat16) if case == "fp32 adapters" else given()
            results.append(computed(block, inputs))
    assert not calls
    assert error(results[1], results[0]) == (0, 0)


def test_without_the_adapter_the_base_alone_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what it computes without PEFT: what a stored reference holds does not change."""
    torch.manual_seed(0)
    base = Block()
    expected = base(given())
    _, ours = pair(copy.deepcopy(base))
    with counted(monkeypatch) as calls, torch.no_grad():
        with active_adapter(nn.ModuleList([ours]), None):
            assert torch.equal(ours(given()), expected)
        merge(ours)
        ours(given())
    assert not calls


def test_adapters_can_be_switched() -> None:
    """Between a pass and the next, as for a reference, and between two layers of one input."""
    theirs, ours = pair()
    for block in (theirs, ours):
        add_second(block)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if "second" in name:
                    parameter.fill_(0.1)
    inputs = given()
    found = []
    for block in (theirs, ours):
        with active_adapter(nn.ModuleList([block]), "second"):
            second = block(inputs)
            q = block.q_proj(inputs)
        with active_adapter(nn.ModuleList([block]), "default"):
            found.append([second, q, block.k_proj(inputs), block.v_proj(inputs), block(inputs)])
    for ours_, theirs_ in zip(*found):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-5)


def change_in_place(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.mul_(2)


@pytest.mark.parametrize(
    "change", [torch.clone, torch.neg, change_in_place, torch.Tensor.detach], ids=lambda f: f.__name__
)
def test_another_input_is_computed_anew(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Between two layers that share theirs elsewhere; also one changed in place."""
    results = []
    for block in pair():
        inputs = given().detach()
        q = block.q_proj(inputs)
        other = change(inputs)
        results.append((q, block.k_proj(other), block.v_proj(other)))
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first_without_gradients", [True, False])
def test_a_pass_without_gradients_gives_none_to_one_with_them(first_without_gradients: bool) -> None:
    _, ours = pair()
    inputs = given()
    with torch.no_grad() if first_without_gradients else nullcontext():
        ours.q_proj(inputs)
    with nullcontext() if first_without_gradients else torch.no_grad():
        assert ours.k_proj(inputs).requires_grad == first_without_gradients


def test_outputs_that_nobody_uses() -> None:
    """Have no gradient, and take none from the others; a graph can be gone through twice."""
    results = []
    for block in pair():
        inputs = given()
        outputs = block.q_proj(inputs), block.k_proj(inputs), block.v_proj(inputs)
        for _ in range(2):
            (outputs[1] * torch.linspace(0, 1, SIZE)).sum().backward(retain_graph=True)
        grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name, gradient in grads.items() if gradient is not None} == {"k_proj"}
        results.append([inputs.grad, *(gradient for gradient in grads.values() if gradient is not None)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_output_can_be_changed_in_place() -> None:
    results = []
    for block in pair():
        inputs = given()
        block.gate_proj(inputs).mul_(2).sum().backward()
        results.append(inputs.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_torch_compile_traces_it() -> None:
    """Without a break of the graph; a compiler merges the gradients of one input itself."""
    theirs, ours = pair()
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    assert max(error(computed(ours, given()), computed(theirs, given()))) < 1e-5
