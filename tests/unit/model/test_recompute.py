"""What is kept for the backward pass, in bytes: the formula of plan/memory.py against a model, and a GPU's peak."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from dsdpo.data.example import TokenizedExample
from dsdpo.data.packing import MicroBatch, build_micro_batch
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import PackedInputs, PackedModel
from dsdpo.model.recompute import recompute_layers
from dsdpo.plan.memory import RECOMPUTE, Recompute, activation_bytes_per_token
from dsdpo.plan.shape import ModelShape
from tests.helpers.tiny import tiny_llama_config

HIDDEN, VOCAB = 128, 256
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 344, "vocab_size": VOCAB, "num_key_value_heads": 4}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made within and are still there."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = 0
        self._known = {p.untyped_storage()._cdata: 0 for p in model.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, storage: int) -> None:
        self.now -= self._known.pop(storage, 0)


def made(layers: int, recompute: Recompute, lora: bool, **sizes: int) -> PackedModel:
    torch.manual_seed(0)
    config = tiny_llama_config(False, **{**SIZES, **sizes}, num_hidden_layers=layers)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=NAMES["sdpa"]).to(torch.bfloat16)
    recompute_layers(base, recompute)
    model: Any = base
    if lora:
        targets = LoraConfig(r=2, target_modules="all-linear")
        model = get_peft_model(base, targets, autocast_adapter_dtype=False)
    return PackedModel(model).train()


def micro_batch(examples: int, prompt: int, completion: int) -> MicroBatch:
    rng = np.random.default_rng(0)
    rows = [
        TokenizedExample(rng.integers(3, VOCAB, prompt), tuple(rng.integers(3, VOCAB, completion) for _ in range(2)))
        for _ in range(examples)
    ]
    return build_micro_batch(rows, range(examples), True)


def kept(layers: int, recompute: Recompute, lora: bool) -> float:
    """Bytes of a token at the end of the forward pass."""
    model, batch = made(layers, recompute, lora), micro_batch(6, 64, 32)
    inputs = PackedInputs.of(batch, torch.device("cpu"))
    with LiveBytes(model) as live:
        output = model(inputs)
        assert output.token_logps is not None
        return live.now / len(batch.input_ids)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_layer_keeps_what_the_formula_says(recompute: Recompute, lora: bool) -> None:
    """Of bf16, as the difference of four layers and two."""
    found = (kept(4, recompute, lora) - kept(2, recompute, lora)) / 2
    shape = [ModelShape.from_module(made(n, recompute, lora)) for n in (2, 4)]
    told = (activation_bytes_per_token(shape[1], 2, recompute) - activation_bytes_per_token(shape[0], 2, recompute)) / 2
    assert 0.85 * told <= found <= 1.05 * told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_peak_on_a_gpu_is_within_a_third_of_the_formula(recompute: Recompute) -> None:
    """A forward and backward pass of eight layers with LoRA."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = made(8, recompute, lora=True, max_position_embeddings=4096, **sizes).cuda()
    inputs = PackedInputs.of(batch := micro_batch(8, 512, 256), torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = model(inputs)
    assert output.token_logps is not None
    output.token_logps.mean().backward()
    found = (torch.cuda.max_memory_allocated() - before) / len(batch.input_ids)
    told = activation_bytes_per_token(ModelShape.from_module(model), 2, recompute)
    assert 2 / 3 * told <= found <= 4 / 3 * told
