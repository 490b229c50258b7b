"""Sizes of models: published ones, and those of models that are there."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from bench.models import BUILT_IN
from dsdpo.model.packed import PackedModel
from dsdpo.plan.shape import ModelShape
from tests.helpers.tiny import tiny_llama_config

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 96}


def test_sizes_are_those_of_the_published_models() -> None:
    llama, adapters = (ModelShape.from_config(BUILT_IN["llama-2-7b"], rank) for rank in (0, 8))
    assert llama.total == llama.trained == 6_738_415_616 and not llama.is_lora
    assert ModelShape.from_config(BUILT_IN["llama-2-70b"]).total == 68_976_648_192
    assert adapters.trained == adapters.lora == 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)) and adapters.is_lora
    assert adapters.total == llama.total + adapters.lora and adapters.linear == llama.linear
    assert llama.largest == 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert llama.largest_tensor == 32000 * 4096


@pytest.mark.parametrize("tied", [True, False])
def test_linear_maps_and_adapters_of_grouped_query_attention(tied: bool) -> None:
    """h = 32, g = 16, i = 64: four maps of attention, three of the MLP, in two layers."""
    maps = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    shape = ModelShape.from_config(tiny_llama_config(tied), lora_rank=4)
    assert (shape.layers, shape.hidden, shape.key_value, shape.intermediate, shape.modules) == (2, 32, 16, 64, 4)
    assert shape.linear == 2 * sum(a * b for a, b in maps)
    assert shape.lora == 2 * 4 * sum(a + b for a, b in maps)


def configs() -> list[PretrainedConfig]:
    gpt2 = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=4, vocab_size=96, n_positions=64)
    qwen3 = AutoConfig.for_model("qwen3", **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=16)
    return [tiny_llama_config(), tiny_llama_config(tied=False), gpt2, qwen3]


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.model_type)
def test_a_config_and_a_loaded_model_agree(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config)
    assert shape == ModelShape.from_module(model) == ModelShape.from_module(PackedModel(model))
    assert shape.total == shape.trained == sum(p.numel() for p in model.parameters())
    assert shape.largest_tensor == max(p.numel() for p in model.parameters())


def test_a_config_and_a_model_with_adapters_agree() -> None:
    config = tiny_llama_config()
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    shape = ModelShape.from_config(config, lora_rank=4)
    assert asdict(shape) == asdict(ModelShape.from_module(PackedModel(model)))
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == shape.lora


def test_a_partitioned_parameter_counts_whole() -> None:
    """ZeRO-3 replaces the data by an empty vector and keeps the shape in `ds_shape`."""
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    whole = ModelShape.from_module(model)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert ModelShape.from_module(model) == whole
