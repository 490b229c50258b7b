"""Adapters that are trained further."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from dsdpo.config.rules import _BEYOND_LORA
from dsdpo.errors import ConfigError
from dsdpo.model.adapters import REFERENCE, continue_lora, reference_weights
from tests.helpers.tiny import save_adapter, save_model, tiny_llama_config

IDS = torch.tensor([[5, 17, 40, 3, 88, 21]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that was saved with dropout, in the folder of its base's folder."""
    save_adapter(tmp_path / "adapter", save_model(tmp_path, tiny_llama_config()), tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.5}))
    return tmp_path / "adapter"


def continued(folder: Path, dropout: float) -> peft.PeftModel:
    """In training mode, as the loop has it."""
    base = AutoModelForCausalLM.from_pretrained(folder.parent, dtype=torch.float32)
    return continue_lora(base, str(folder), keep_reference=True, dropout=dropout).train()


@pytest.mark.parametrize("part", ["layers.0.", "q_proj", "lora_B", ""])
def test_an_adapter_that_is_not_of_this_model_is_told(folder: Path, part: str) -> None:
    """Where matrices are missing, and where there are more; PEFT would go on."""
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    more = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 4)}
    kept = {name: tensor for name, tensor in whole.items() if part not in name} if part else whole | more
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        continued(folder, 0.0)
    assert [problem.code for problem in caught.value.problems] == ["adapter-incomplete"]


def test_the_option_says_the_dropout_not_the_adapter(folder: Path) -> None:
    for dropout, kinds in ((0.0, {nn.Identity}), (0.2, {nn.Dropout})):
        model = continued(folder, dropout)
        layers = [module.lora_dropout["default"] for module in model.modules() if hasattr(module, "lora_dropout")]
        assert {type(layer) for layer in layers} == kinds
        assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} <= {dropout}
        assert model.peft_config["default"].lora_dropout == dropout, "what an export tells of the adapter"
        assert all(p.requires_grad == (".default." in name) for name, p in model.named_parameters())


@torch.no_grad()
def test_without_dropout_the_policy_starts_as_its_reference(folder: Path) -> None:
    """The policy's pass is one in training mode, the reference's in eval mode, where the copy drops nothing out."""
    model = continued(folder, 0.0)
    policy, again = model(IDS).logits, model(IDS).logits
    with reference_weights(model.eval()):
        reference = model(IDS).logits
    assert REFERENCE in model.peft_config
    assert torch.equal(policy, again) and torch.equal(policy, reference)


@torch.no_grad()
def test_dropout_acts_on_the_policy_alone(folder: Path) -> None:
    model = continued(folder, 0.2)
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    with reference_weights(model.eval()):
        first, second = model(IDS).logits, model(IDS).logits
    assert torch.equal(first, second)


def test_what_is_refused_is_what_peft_calls_it() -> None:
    """Every key is one of PEFT's, and none of its variants of LoRA is forgotten."""
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    if "kasa_config" not in fields:
        pytest.skip("peft before 0.21 knows fewer variants of LoRA")
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    assert variants and variants <= set(_BEYOND_LORA) <= fields.keys()
