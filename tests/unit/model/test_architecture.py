"""config.json alone tells what transformers' config object tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from dsdpo.model.architecture import Architecture
from dsdpo.model.support import problems
from tests.helpers.tiny import FAMILIES

LENGTHS = (64, 1024, 4097, 8193, 40_000, 200_000, 1_000_000)
CHANGES: list[dict[str, Any]] = [
    {},
    {"attention_dropout": 0.1},
    {"sliding_window": 512},
    {"sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 512, "num_hidden_layers": 4, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 512, "num_hidden_layers": 4, "max_window_layers": 4},
    {"use_sliding_window": False, "sliding_window": 512},
    {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 512},
    {"num_hidden_layers": 2, "layer_types": ["full_attention", "full_attention"]},
    {"attention_chunk_size": 256},
    {"attn_logit_softcapping": 30.0},
    {"use_bidirectional_attention": True},
    {"is_causal": False},
    {"num_experts": 4},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"load_in_4bit": True}},
    {"max_position_embeddings": 512},
    {"head_dim": 100},
    {"hidden_size": 600, "num_attention_heads": 6},
]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0},
]
LINEAR = {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}
LONGROPE = {"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}
FOREIGN: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {}),
    ("llama4_text", {}),
    ("falcon", {"alibi": True}),
    ("t5", {}),
    ("gemma3", {}),
    ("mixtral", {"sliding_window": None}),
    ("deepseek_v3", {}),
    ("qwen3_moe", {}),
    ("gpt_oss", {}),
    ("bloom", {}),
    ("mamba", {}),
    ("qwen3_next", {}),
]


def written(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """What save_pretrained writes, which leaves out what the class has as its default."""
    config.save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def codes(model: Architecture, max_length: int, backend: str = "auto") -> list[str]:
    return [one.code for one in problems(model, max_length, disable_dropout=False, backend=backend)]


def compare(config: PretrainedConfig, settings: dict[str, Any]) -> None:
    exact, told = Architecture.of(config), Architecture.read(settings)
    for max_length in LENGTHS:
        assert codes(told, max_length) == codes(exact, max_length), (config.model_type, max_length, settings)
    if told.head_size is not None:
        assert codes(told, 64, "varlen") == codes(exact, 64, "varlen")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_file_tells_what_the_config_object_tells(tmp_path: Path, model_type: str) -> None:
    compared = 0
    for changes in CHANGES:
        try:
            config = AutoConfig.for_model(model_type, **changes)
        except Exception:  # transformers refuses some settings of some types, each in its own way
            continue
        compare(config, written(config, tmp_path))
        compare(config, {"model_type": model_type, **changes})
        compared += 1
    assert compared >= len(CHANGES) - 3


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma"])
def test_scaled_positions_reach_further(tmp_path: Path, model_type: str, rope: dict[str, Any]) -> None:
    config = AutoConfig.for_model(model_type, rope_parameters={"rope_theta": 1e4, **rope}, sliding_window=None)
    compare(config, written(config, tmp_path))
    earlier = {"model_type": model_type, "sliding_window": None, "rope_scaling": rope}
    compare(AutoConfig.for_model(**dict(earlier, rope_scaling=dict(rope))), earlier)


@pytest.mark.parametrize(("model_type", "changes"), FOREIGN)
def test_other_models_are_refused_from_their_file(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(model_type, **changes)
    assert codes(Architecture.of(config), 64) and codes(Architecture.read(written(config, tmp_path)), 64)


@pytest.mark.parametrize(
    ("settings", "max_length", "code"),
    [
        ({"model_type": "llama"}, 2048, ""),
        ({"model_type": "llama"}, 2049, "model-positions"),
        ({"model_type": "gpt2", "attn_pdrop": 0.0}, 1024, ""),
        ({"model_type": "gpt2", "attn_pdrop": 0.0, "n_positions": 512}, 1024, "model-positions"),
        (LINEAR, 16384, ""),
        (LINEAR, 16385, "model-positions"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072, ""),
        ({"model_type": "mistral", "sliding_window": None}, 131073, "model-positions"),
        ({"model_type": "mistral"}, 8192, "model-window"),
        ({"model_type": "phi3"} | LONGROPE, 4096, ""),
        ({"model_type": "phi3"} | LONGROPE, 4097, "model-positions"),
        ({"model_type": "bert"}, 64, "model-type"),
        ({"model_type": "llama", "per_layer_config": {"0": {}}}, 64, "model-layers"),
        ({"model_type": "llama", "text_config": {}}, 64, "model-more-than-text"),
    ],
)  # fmt: skip
def test_what_a_file_says(settings: dict[str, Any], max_length: int, code: str) -> None:
    assert codes(Architecture.read(settings), max_length) == [code] * bool(code)
