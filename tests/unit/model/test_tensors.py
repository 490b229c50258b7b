"""Weight files that are not those of config.json: told from headers, and by the ranks where headers cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.model.attention import register
from dsdpo.model.attention.names import NAMES
from dsdpo.model.load import load_model
from dsdpo.model.tensors import tensor_problems
from dsdpo.runtime.weights import narrow, shapes, weight_files
from tests.helpers.tiny import save_model, tiny_llama_config

assert register.NAMES
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
TYPES = ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "phi3", "gemma3_text", "olmo2", "cohere2", "smollm3", "exaone4"]
Tensors = dict[str, torch.Tensor]


def codes(folder: Path) -> list[str]:
    settings, (files, _) = json.loads((folder / "config.json").read_text()), weight_files(folder)
    return [code for code, _ in tensor_problems(settings, shapes(files), narrow=narrow(files))]


def load(folder: Path) -> list[str]:
    config = RunConfig(model_name_or_path=str(folder), dataset=["d"], output_dir="o", max_length=16)
    try:
        load_model(str(folder), config, {}, NAMES["sdpa"], torch.float32)
    except ConfigError as error:
        return [problem.code for problem in error.problems]
    return []


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], **settings: Any) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_saved_model_is_complete_and_a_layer_less_is_told(tmp_path: Path, model_type: str) -> None:
    """Also each tensor of the second layer alone, and the embedding."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64} if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, **sizes, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert codes(tmp_path) == []
    settings, whole = json.loads((tmp_path / "config.json").read_text()), shapes(weight_files(tmp_path)[0])
    second = [name for name in whole if ".1." in name]
    embedding = next(name for name in whole if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")))
    for lost in (*([name] for name in second), second, [embedding]):
        rest = {name: shape for name, shape in whole.items() if name not in lost}
        assert [code for code, _ in tensor_problems(settings, rest)] == ["weights-incomplete"], lost
    width = {"gpt2": "n_embd", "opt": "word_embed_proj_dim"}.get(model_type, "hidden_size")
    for key, value in (("vocab_size", 65), (width, 32)):
        assert [code for code, _ in tensor_problems(settings | {key: value}, whole)] == ["weights-mismatch"], key


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


CASES: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], list[str], list[str]]] = {
    "all": (lambda tensors: tensors, {}, [], []),
    "a tied head": (without("lm_head"), {"tie_word_embeddings": True}, [], []),
    "no head": (without("lm_head"), {"tie_word_embeddings": False}, [], ["weights-incomplete"]),
    "no queries": (without("q_proj"), {}, [], ["weights-incomplete"]),
    "no last norm": (without("model.norm"), {}, [], ["weights-incomplete"]),
    "a layer less": (without("layers.0."), {}, ["weights-incomplete"], ["weights-incomplete"]),
    "another width": (lambda tensors: tensors, {"intermediate_size": 48}, [], ["weights-mismatch"]),
    "8 bits": (
        lambda tensors: {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for n, t in tensors.items()},
        {},
        ["model-quantized"],
        [],
    ),
    "a text as number": (lambda tensors: tensors, {"rms_norm_eps": "small"}, [], ["model-config"]),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_look_again(tmp_path: Path, name: str) -> None:
    change, settings, in_headers, on_ranks = CASES[name]
    save_model(tmp_path, tiny_llama_config())
    rewrite(tmp_path, change, **settings)
    assert codes(tmp_path) == in_headers
    assert load(tmp_path) == on_ranks
