"""What decides whether a model is right on packed rows, from its config object or from its config.json alone.

A config.json may leave out what its class has as a default. Those defaults that matter stand here, so that the check
before a run needs no transformers; `tests/unit/model/test_architecture.py` holds them against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_DROPOUT = ("attention_dropout", "attn_pdrop")
_OTHER_NAMES = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head"}

# --- defaults of the classes ---

LEARNED_POSITIONS = ("gpt2", "opt")
_PREFIXES = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}
_POSITIONS = {
    **dict.fromkeys(("arcee", "helium", "phi3", "starcoder2"), 4096),
    **dict.fromkeys(("cohere", "cohere2", "gemma"), 8192),
    **dict.fromkeys(("internlm3", "qwen2", "qwen3", "smollm3"), 32768),
    **dict.fromkeys(("ernie4_5", "gemma3_text", "glm", "glm4", "ministral", "mistral"), 131072),
    **dict.fromkeys(("exaone4", "gpt_neox", "granite", "hunyuan_v1_dense", "llama", "olmo", "olmo2", "olmo3"), 2048),
    **dict.fromkeys(("opt", "phi"), 2048),
    "apertus": 65536,
    "gpt2": 1024,
    "seed_oss": 524288,
}
_WINDOWS = dict.fromkeys(("cohere2", "exaone4", "gemma3_text", "ministral", "mistral", "olmo3"), 4096)
# Types that declare layer_types: those with windows in some layers where config.json has no layer_types, and the
# others. A type that does not declare it, such as Mistral, ignores it in a config file.
_WINDOWED = ("cohere2", "exaone4", "gemma3_text", "ministral", "olmo3")
_WINDOWED_ABOVE = ("qwen2", "qwen3")  # in the layers from max_window_layers on
_LAYER_TYPES = (*_WINDOWED, *_WINDOWED_ABOVE, "smollm3")
_HEAD_DIM = ("ernie4_5", "gemma", "gemma3_text", "glm", "glm4", "helium", "internlm3", "qwen3", "seed_oss")
_DROPPING = {"gpt2": 0.1, "seed_oss": 0.1}
_LLAMA3_ROPE = {"apertus": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}
_PHI3_ORIGINAL = 4096


@dataclass(frozen=True)
class Architecture:
    """Attention, positions and layers of a model.

    Attributes:
        model_type: of config.json.
        window: tokens that a sliding-window layer attends over; None without such layers.
        chunk: tokens of chunked attention; None without it.
        other_layers: kinds of layers that are neither full nor sliding attention.
        softcap, alibi, bidirectional, encoder_decoder, more_than_text, experts, differing_layers: what it has or is.
        drops_attention: whether attention has dropout.
        learned_positions: whether positions have learned embeddings.
        positions: longest sequence that config.json names; None where it names none.
        ropes: settings of rotary positions, one for each kind of layer that has its own.
        head_size: dimensions of a head; None where config.json does not tell.
        quantized: by what method the stored weights are quantized, such as `gptq`; empty where they are not.
    """

    model_type: str
    window: int | None
    chunk: int | None
    other_layers: tuple[str, ...]
    softcap: bool
    alibi: bool
    bidirectional: bool
    encoder_decoder: bool
    more_than_text: bool
    experts: bool
    differing_layers: bool
    drops_attention: bool
    learned_positions: bool
    positions: int | None
    ropes: tuple[dict[str, Any], ...]
    head_size: int | None
    quantized: str

    @classmethod
    def of(cls, config: PretrainedConfig) -> Architecture:
        """Of a config object, whose class knows every default."""
        if config.__dict__.get("_heterogeneity_spec") is not None:  # reading a setting of such a config is an error
            return cls.read({"model_type": config.model_type, "per_layer_config": True})
        layers = getattr(config, "layer_types", None)
        windowed = getattr(config, "use_sliding_window", True)
        if layers and hasattr(type(config), "layer_types"):
            windowed = "sliding_attention" in layers
        rope = getattr(config, "rope_parameters", None)
        return cls(
            model_type=config.model_type,
            window=getattr(config, "sliding_window", None) if windowed else None,
            chunk=getattr(config, "attention_chunk_size", None),
            other_layers=_others(layers),
            softcap=bool(getattr(config, "attn_logit_softcapping", None)),
            alibi=bool(getattr(config, "alibi", False)),
            bidirectional=bool(getattr(config, "use_bidirectional_attention", False))
            or getattr(config, "is_causal", True) is False,
            encoder_decoder=bool(config.is_encoder_decoder),
            more_than_text=config.get_text_config() is not config,
            experts=any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS),
            differing_layers=False,
            drops_attention=any(getattr(config, key, 0.0) for key in _DROPOUT),
            learned_positions=rope is None,
            positions=getattr(config, "max_position_embeddings", None),
            ropes=_ropes(rope),
            head_size=getattr(config, "head_dim", None) or _quotient(config),
            quantized=_method(getattr(config, "quantization_config", None)),
        )

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Architecture:
        """Of the content of a config.json. What it leaves out and no table here has counts as not there."""
        kind = str(settings.get("model_type"))

        def get(key: str, default: Any = None) -> Any:
            return settings.get(key, settings.get(_OTHER_NAMES.get(key, key), default))

        layers, learned = get("layer_types"), kind in LEARNED_POSITIONS
        size = get("head_dim") or (None if kind in _HEAD_DIM else _size(get("hidden_size"), get("num_attention_heads")))
        return cls(
            model_type=kind,
            window=_number(get("sliding_window", _WINDOWS.get(kind))) if _is_windowed(kind, settings) else None,
            chunk=_number(get("attention_chunk_size")),
            other_layers=_others(layers),
            softcap=bool(get("attn_logit_softcapping")),
            alibi=bool(get("alibi")),
            bidirectional=bool(get("use_bidirectional_attention")) or get("is_causal", True) is False,
            encoder_decoder=bool(get("is_encoder_decoder")),
            more_than_text=get("text_config") is not None,
            experts=any((_number(get(key)) or 0) > 1 for key in _EXPERTS),
            differing_layers=bool(get("per_layer_config")),
            drops_attention=any(get(key, _DROPPING.get(kind, 0.0)) for key in _dropout_keys(kind)),
            learned_positions=learned,
            positions=_number(get("max_position_embeddings", _POSITIONS.get(kind))),
            ropes=() if learned else _ropes(_rope_of(kind, settings)),
            head_size=_number(size),
            quantized=_method(get("quantization_config")),
        )


def module_prefix(model_type: str) -> str:
    """What names of modules begin with, all but the head's; files of weights may leave it out."""
    return _PREFIXES.get(model_type, "model")


def _is_windowed(kind: str, settings: Mapping[str, Any]) -> bool:
    layers = settings.get("layer_types")
    if kind not in _LAYER_TYPES:
        return bool(settings.get("use_sliding_window", True))
    if kind in _WINDOWED_ABOVE and not settings.get("use_sliding_window"):
        return False
    if layers:
        return "sliding_attention" in str(layers)
    if kind in _WINDOWED_ABOVE:
        first, count = _number(settings.get("max_window_layers", 28)), _number(settings.get("num_hidden_layers", 32))
        return (first or 0) < (count or 0)
    return kind in _WINDOWED or bool(settings.get("use_sliding_window"))


def _dropout_keys(kind: str) -> tuple[str, ...]:
    return ("attn_pdrop",) if kind == "gpt2" else ("attention_dropout",)


def _rope_of(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, or what earlier versions of transformers wrote as `rope_scaling`."""
    found = settings.get("rope_parameters") or settings.get("rope_scaling") or _LLAMA3_ROPE.get(kind, {})
    if not isinstance(found, dict):
        return {}
    if kind == "phi3" and (found.get("rope_type") or found.get("type")) in ("su", "yarn"):
        found = {**found, "rope_type": "longrope"}  # as its class reads the names of its first versions
    original = settings.get("original_max_position_embeddings", _PHI3_ORIGINAL if kind == "phi3" else None)
    return {"original_max_position_embeddings": original, **found} if original else found


def _method(settings: Any) -> str:
    """Of a `quantization_config`: its quant_method, which the first ones of bitsandbytes lack."""
    if not settings:
        return ""
    named = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    return str(getattr(named, "value", named) or "bitsandbytes")


def _others(layers: Any) -> tuple[str, ...]:
    names = layers if isinstance(layers, (list, tuple)) else filter(None, [layers])
    return tuple(sorted(set(map(str, names)) - {"full_attention", "sliding_attention"}))


def _ropes(settings: Any) -> tuple[dict[str, Any], ...]:
    settings = settings or {}
    return tuple(value for value in settings.values() if isinstance(value, dict)) or (settings,)


def _quotient(config: PretrainedConfig) -> int | None:
    return _size(getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None))


def _size(hidden: Any, heads: Any) -> int | None:
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
