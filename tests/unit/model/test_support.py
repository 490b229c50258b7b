"""Which models are refused, each with what was found and what to change."""

from typing import Any

import pytest
import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from dsdpo.errors import ConfigError
from dsdpo.model.architecture import Architecture
from dsdpo.model.attention.register import NAMES
from dsdpo.model.support import COMPARED, NO_SCORE, check_supported, problems
from tests.helpers.tiny import FAMILIES


def config(model_type: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **changes)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}


# PretrainedConfig keeps and changes the dict that it is given, so each gets a copy.
LONGROPE = rope("longrope", short_factor=[1.0] * 48, long_factor=[2.0] * 48, original_max_position_embeddings=1024)


@pytest.mark.parametrize(
    "model",
    [
        config("llama"),
        config("mistral", sliding_window=1024),
        config("mistral", sliding_window=None),
        config("qwen2", use_sliding_window=False, sliding_window=64),
        config("qwen2", use_sliding_window=True, sliding_window=64, num_hidden_layers=4, max_window_layers=4),
        config("gemma3_text", sliding_window=1024),
        config("gpt2"),
        config("llama", rope_parameters=rope("yarn", original_max_position_embeddings=256)),
        config("llama", rope_parameters=rope("dynamic"), max_position_embeddings=1024),
        config("phi3", rope_parameters=dict(LONGROPE), original_max_position_embeddings=1024),
    ],
    ids=lambda model: model.model_type,
)
def test_taken_at_1024_tokens(model: PretrainedConfig) -> None:
    check_supported(model, 1024, disable_dropout=True)


REFUSED = {
    "mistral's window": (config("mistral", sliding_window=1023), "windows of 1023 tokens.*max_length to 1023"),
    # Mistral's model does not read layer_types
    "mistral's idle layer types": (
        config("mistral", sliding_window=512, layer_types=["full_attention"] * 32),
        "windows of 512 tokens",
    ),
    "phi3's window": (config("phi3", sliding_window=512), "windows of 512 tokens"),
    "qwen2's upper layers": (
        config("qwen2", use_sliding_window=True, sliding_window=64, num_hidden_layers=4, max_window_layers=3),
        "windows of 64 tokens",
    ),
    "gemma3's layer types": (config("gemma3_text", sliding_window=512), "windows of 512 tokens"),
    "soft-capped scores": (config("gemma2", sliding_window=8192), "attn_logit_softcapping"),
    "bidirectional": (
        config("gemma3_text", use_bidirectional_attention=True, sliding_window=8192),
        "bidirectional attention; packed rows need a causal",
    ),
    "not causal": (config("llama", is_causal=False), "bidirectional"),
    "chunks": (config("llama4_text"), "chunked_attention"),
    "chunks in a llama": (config("llama", attention_chunk_size=256), "attention_chunk_size 256"),
    "linear attention": (config("qwen3_next"), "linear_attention"),
    "convolutions": (config("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2), "conv"),
    "ALiBi": (config("falcon", alibi=True), "ALiBi"),
    "an encoder-decoder": (config("t5"), "encoder-decoder"),
    "images": (config("gemma3"), "more than text"),
    "experts": (config("mixtral", sliding_window=None), "mixture of experts"),
    "deepseek's experts": (config("deepseek_v3"), "mixture of experts"),
    "qwen's experts": (config("qwen3_moe"), "mixture of experts"),
    "sinks": (config("gpt_oss", num_local_experts=1, sliding_window=None), "gpt_oss has not been compared"),
    "its own attention": (config("bloom"), "bloom has not been compared"),
    "a state space": (config("mamba"), "linear_attention"),
    "dynamic rope": (
        config("llama", rope_parameters=rope("dynamic"), max_position_embeddings=512),
        "depend on the packing: set max_length to 512",
    ),
    "longrope": (
        config("phi3", rope_parameters=dict(LONGROPE), original_max_position_embeddings=512),
        "depend on the packing: set max_length to 512",
    ),
    "layers that differ": (
        config("llama", num_hidden_layers=2, per_layer_config={0: {"head_dim": 64}, 1: {"head_dim": 32}}),
        "layers differ",
    ),
    "learned positions": (config("gpt2", n_positions=512), "learned positions for 512 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_1024_tokens(name: str) -> None:
    model, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        check_supported(model, 1024, disable_dropout=True)


def test_attention_dropout_is_refused() -> None:
    for model in (config("llama", attention_dropout=0.1), config("gpt2")):
        check_supported(model, 1024, disable_dropout=True)
        with pytest.raises(ConfigError, match="disable_dropout: true"):
            check_supported(model, 1024, disable_dropout=False)


@pytest.mark.parametrize("size", [100, 264])
def test_head_sizes_that_kernels_do_not_take_are_refused(size: int) -> None:
    model = config("llama", head_dim=size)
    check_supported(model, 1024, True, NAMES["flex_attention"])
    for backend in ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"):
        check_supported(config("llama"), 1024, True, NAMES[backend])
        with pytest.raises(ConfigError, match=f"{size} dimensions, {backend} takes"):
            check_supported(model, 1024, True, NAMES[backend])


def test_every_reason_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        check_supported(config("gemma2", sliding_window=512), 1024, disable_dropout=True)
    assert len(error.value.problems) == 2


def test_families_of_the_readme_are_compared() -> None:
    assert {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "phi", "phi3", "gpt2"} <= COMPARED


def test_all_families_but_new_ones_are_tested() -> None:
    """internlm3 is not in transformers 5.17 to 5.20."""
    assert COMPARED - set(FAMILIES) <= {"internlm3"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_reward_models_are_those_that_transformers_classifies_sequences_with(model_type: str) -> None:
    """A bias or a second layer of the head would not be in the rewards here."""
    config = AutoConfig.for_model(model_type, num_labels=1, num_hidden_layers=2)
    assert (model_type in NO_SCORE) == (type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    codes = [problem.code for problem in problems(Architecture.of(config), 64, True, head="value")]
    assert ("model-no-score" in codes) == (model_type in NO_SCORE)
    if model_type not in NO_SCORE:
        config.head_dim = 64  # the default of some is none
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        own = [name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]
        assert own == ["score.weight"] and model.score.weight.shape[0] == 1


@pytest.mark.parametrize(
    ("settings", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_4bit": True}, "bitsandbytes"), (None, "")],
)
def test_a_model_that_is_stored_quantized_is_named_by_its_method(settings: Any, method: str) -> None:
    read = Architecture.read({"model_type": "llama", "quantization_config": settings})
    assert read.quantized == method == Architecture.of(config("llama", quantization_config=settings)).quantized
    found = [problem for problem in problems(read, 1024, True) if problem.code == "model-quantized"]
    assert [method in problem.text for problem in found] == [True] * bool(method)
