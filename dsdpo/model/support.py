"""Which models are right on packed rows, and why the others are refused."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dsdpo.errors import ConfigError
from dsdpo.model.attention.backends import VARLEN_KERNELS
from dsdpo.model.attention.register import NAMES

# The model types whose log-probs and gradients on packed rows tests/parity/test_families.py compares with transformers'
# own padded computation. Nothing in a model's class tells whether it mixes tokens elsewhere or scales its logits, so a
# type that is not compared is refused.
# fmt: off
COMPARED = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "internlm3", "llama", "ministral", "mistral", "olmo", "olmo2",
    "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
})
# fmt: on

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_supported(
    config: PretrainedConfig, max_length: int, disable_dropout: bool, attn_implementation: str = NAMES["sdpa"]
) -> None:
    """Refuse models of which packed rows would compute something else.

    Args:
        config: of the model.
        max_length: the longest prompt + completion.
        disable_dropout: whether the model's dropout is set to 0.
        attn_implementation: a name that `choose` gave.

    Raises:
        ConfigError: each reason that was found, and what to change.
    """
    if config.__dict__.get("_heterogeneity_spec") is not None:  # reading a setting of such a config is an error
        raise ConfigError("the model's layers differ (per_layer_config): train another model [model_name_or_path]")
    problems = _attention_problems(config, max_length) + _position_problems(config, max_length)
    if not disable_dropout and any(getattr(config, key, 0.0) for key in ("attention_dropout", "attn_pdrop")):
        problems.append("the model has attention dropout, which packed rows do not support: set disable_dropout: true")
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS):
        problems.append("the model is a mixture of experts, whose balancing loss is not computed: train a dense model")
    if config.model_type in COMPARED:
        problems += _kernel_problems(config, attn_implementation)
    elif not problems:
        problems.append(
            f"model type {config.model_type} has not been compared with transformers' own computation on packed "
            f"rows; allowed: {', '.join(sorted(COMPARED))}"
        )
    if problems:
        raise ConfigError([f"{problem} [model_name_or_path]" for problem in problems])


def _attention_problems(config: PretrainedConfig, max_length: int) -> list[str]:
    """What is more than causal softmax attention of a decoder over the whole sequence."""
    problems = []
    window = _window(config)
    if window and window < max_length:
        problems.append(
            f"the model attends over windows of {window} tokens, which packed rows do not support: set max_length "
            f"to {window} or less"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if chunk or other:
        what = ", ".join(sorted(other)) or f"attention_chunk_size {chunk}"
        problems.append(f"the model has layers other than full and sliding attention ({what}): train another model")
    if getattr(config, "attn_logit_softcapping", None):
        problems.append(
            "the model caps its attention scores (attn_logit_softcapping), which packed rows do not support: train "
            "another model"
        )
    if getattr(config, "alibi", False):
        problems.append("the model adds ALiBi biases to its attention scores: train a model with rotary positions")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        problems.append("the model's attention is bidirectional; packed rows need a causal model")
    if config.is_encoder_decoder:
        problems.append("the model is an encoder-decoder; packed rows need a decoder-only model")
    elif config.get_text_config() is not config:
        problems.append("the model takes more than text; packed rows need a text model, such as the one inside it")
    return problems


def _window(config: PretrainedConfig) -> int | None:
    """Tokens that a sliding-window layer attends over; None without such layers."""
    layers = getattr(config, "layer_types", None)
    # A type that does not declare layer_types, such as Mistral, ignores those in a config file.
    if layers and hasattr(type(config), "layer_types"):
        windowed = "sliding_attention" in layers
    else:
        windowed = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if windowed else None


def _position_problems(config: PretrainedConfig, max_length: int) -> list[str]:
    """Learned positions end; some rotary ones change for all pairs of a row with the longest among them."""
    learned = getattr(config, "rope_parameters", None) is None
    longest = getattr(config, "max_position_embeddings", None)
    if learned and longest and longest < max_length:
        return [f"the model has learned positions for {longest} tokens: set max_length to {longest} or less"]
    for rope in _rope_settings(config):
        limit = rope.get("original_max_position_embeddings") or longest
        kind = rope.get("rope_type") or "default"
        if ("dynamic" in kind or kind == "longrope") and limit and limit < max_length:
            return [
                f"the model's {kind} rotary positions change for a whole row when one of its pairs has "
                f"more than {limit} tokens, so that results would depend on the packing: set max_length to {limit} or "
                "less"
            ]
    return []


def _rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """`rope_parameters`, once or for each layer type."""
    settings = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in settings.values() if isinstance(value, dict)]
    return by_layer_type or [settings]


def _kernel_problems(config: PretrainedConfig, attn_implementation: str) -> list[str]:
    """Head sizes that the variable-length kernels do not take."""
    varlen = {NAMES[backend]: backend for backend in VARLEN_KERNELS}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if attn_implementation in varlen and (size > 256 or size % 8):
        return [
            f"the model's heads have {size} dimensions, {varlen[attn_implementation]} takes multiples of 8 up to 256: "
            "set attn_implementation to sdpa or flex_attention"
        ]
    return []
