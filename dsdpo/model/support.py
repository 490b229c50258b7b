"""Which models are right on packed rows, and why the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsdpo.errors import ConfigError, Problem
from dsdpo.model.architecture import Architecture
from dsdpo.model.attention.names import NAMES, VARLEN

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The model types whose log-probs and gradients on packed rows tests/parity/test_families.py compares with transformers'
# own padded computation. Nothing in a model's class tells whether it mixes tokens elsewhere or scales its logits, so a
# type that is not compared is refused.
# fmt: off
COMPARED = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "internlm3", "llama", "ministral", "mistral", "olmo", "olmo2",
    "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
})
# Those of them that dsdpo/model/liger.py has Liger's kernels for.
LIGER = frozenset({
    "exaone4", "gemma", "gemma3_text", "glm4", "granite", "hunyuan_v1_dense", "llama", "ministral", "mistral", "olmo2",
    "olmo3", "phi3", "qwen2", "qwen3", "smollm3",
})
# Those of COMPARED that transformers has no model for sequence classification of.
NO_SCORE = frozenset({"apertus", "cohere", "cohere2", "ernie4_5", "granite", "internlm3"})
# fmt: on


def check_supported(
    config: PretrainedConfig,
    max_length: int,
    disable_dropout: bool,
    attn_implementation: str = NAMES["sdpa"],
    head: str = "logprob",
) -> None:
    """Refuse models of which packed rows would compute something else.

    Args:
        config: of the model.
        max_length: the longest prompt + completion.
        disable_dropout: whether the model's dropout is set to 0.
        attn_implementation: a name that `choose` gave.
        head: of the model, see `dsdpo.config.stages.StageSpec`.

    Raises:
        ConfigError: each reason that was found, and what to change.
    """
    backend = next(ours for ours, name in NAMES.items() if name == attn_implementation)
    if found := problems(Architecture.of(config), max_length, disable_dropout, backend, head):
        raise ConfigError(found)


# Code, what of an Architecture makes it a problem, and the rest of a sentence that begins with `the model`.
_UNSUPPORTED: tuple[tuple[str, Callable[[Architecture], object], str], ...] = (
    (
        "softcap",
        lambda model: model.softcap,
        "caps its attention scores (attn_logit_softcapping), which packed rows do not support: train another model",
    ),
    ("alibi", lambda model: model.alibi, "adds ALiBi biases to its attention scores: train one with rotary positions"),
    (
        "bidirectional",
        lambda model: model.bidirectional,
        "has bidirectional attention; packed rows need a causal model",
    ),
    ("encoder-decoder", lambda model: model.encoder_decoder, "is an encoder-decoder; packed rows need a decoder"),
    (
        "more-than-text",
        lambda model: model.more_than_text and not model.encoder_decoder,
        "takes more than text; packed rows need a text model, such as the one inside it",
    ),
    (
        "experts",
        lambda model: model.experts,
        "is a mixture of experts, whose balancing loss is not computed: train a dense model",
    ),
)


def problems(
    model: Architecture, max_length: int, disable_dropout: bool, backend: str = "auto", head: str = "logprob"
) -> list[Problem]:
    """Why packed rows would compute something else than the model, and what to change.

    Args:
        backend: an `attn_implementation`; `auto` where the device that decides it is not known.
        head: of the model, see `dsdpo.config.stages.StageSpec`.
    """
    if model.differing_layers:
        return [_problem("layers", "the model's layers differ (per_layer_config): train another model")]
    found = _layer_problems(model, max_length) + _position_problems(model, max_length)
    found += [_problem(code, f"the model {text}") for code, applies, text in _UNSUPPORTED if applies(model)]
    if model.quantized:
        text = (
            f"the model's weights are stored quantized ({model.quantized}, quantization_config in config.json), and "
            "training begins from full ones: name its full model, and quantization_bit: 4 to quantize that on loading"
        )
        found.append(_problem("quantized", text))
    if not disable_dropout and model.drops_attention:
        text = "the model has attention dropout, which packed rows do not support: set disable_dropout: true"
        found.append(_problem("dropout", text))
    if model.model_type in COMPARED:
        found += head_problems(model, backend)
        if head == "value" and model.model_type in NO_SCORE:
            text = (
                f"transformers has no sequence classification model for the type {model.model_type}, which a reward "
                f"model is; allowed: {', '.join(sorted(COMPARED - NO_SCORE))}"
            )
            found.append(_problem("no-score", text))
    elif not found:
        text = (
            f"model type {model.model_type} has not been compared with transformers' own computation on packed "
            f"rows; allowed: {', '.join(sorted(COMPARED))}"
        )
        found.append(_problem("type", text))
    return found


# Kinds of problems that another option than the model's name can mend.
_OPTIONS = {
    "window": "max_length",
    "positions": "max_length",
    "dropout": "disable_dropout",
    "heads": "attn_implementation",
}


def _problem(code: str, text: str) -> Problem:
    option = _OPTIONS.get(code, "model_name_or_path")
    return Problem(f"model-{code}", option, f"{text} [model_name_or_path]")


def _layer_problems(model: Architecture, max_length: int) -> list[Problem]:
    """Layers whose attention is not over the whole sequence."""
    found = []
    if model.window is not None and model.window < 1:
        text = f"sliding_window is {model.window} in config.json; write null there where the model has no window"
        found.append(_problem("config", text))
    elif model.window and model.window < max_length:
        text = (
            f"the model attends over windows of {model.window} tokens, which packed rows do not support: set "
            f"max_length to {model.window} or less"
        )
        found.append(_problem("window", text))
    if model.chunk or model.other_layers:
        what = ", ".join(model.other_layers) or f"attention_chunk_size {model.chunk}"
        text = f"the model has layers other than full and sliding attention ({what}): train another model"
        found.append(_problem("layers", text))
    return found


def _position_problems(model: Architecture, max_length: int) -> list[Problem]:
    """Learned positions end; some rotary ones change for all pairs of a row with the longest among them; the others
    have been trained so far and no further."""
    longest = model.positions
    if model.learned_positions:
        text = f"the model has learned positions for {longest} tokens: set max_length to {longest} or less"
        return [_problem("positions", text)] if longest and longest < max_length else []
    for rope in model.ropes:
        limit = rope.get("original_max_position_embeddings") or longest
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        if ("dynamic" in kind or kind == "longrope") and limit and limit < max_length:
            text = (
                f"the model's {kind} rotary positions change for a whole row when one of its pairs has "
                f"more than {limit} tokens, so that results would depend on the packing: set max_length to {limit} or "
                "less"
            )
            return [_problem("positions", text)]
    reach = max([longest or 0, *(_scaled(rope, longest) for rope in model.ropes)])
    if longest and reach < max_length:
        text = (
            f"the model has been trained on positions up to {reach}, and max_length is {max_length}: set max_length to "
            f"{reach} or less, or scale its positions (rope_scaling in config.json)"
        )
        return [_problem("positions", text)]
    return []


def _scaled(rope: dict[str, Any], longest: int | None) -> int:
    """Tokens that a scaling of rotary positions reaches: `factor` times those that the model was trained on."""
    original, factor = rope.get("original_max_position_embeddings") or longest, rope.get("factor")
    if not isinstance(original, (int, float)) or not isinstance(factor, (int, float)):
        return 0
    return int(original * factor)


def head_problems(model: Architecture, backend: str) -> list[Problem]:
    """Head sizes that the variable-length kernels do not take."""
    size = model.head_size
    if backend in VARLEN and size and (size > 256 or size % 8):
        text = (
            f"the model's heads have {size} dimensions, {backend} takes multiples of 8 up to 256: "
            "set attn_implementation to sdpa or flex_attention"
        )
        return [_problem("heads", text)]
    return []


def unknown_to_liger(model_type: str) -> str:
    """What to say of a model that Liger has no kernels for."""
    return (
        f"kernels is liger, which has none for the model type {model_type}; allowed: {', '.join(sorted(LIGER))}. Set "
        "kernels: auto, compile or none"
    )
