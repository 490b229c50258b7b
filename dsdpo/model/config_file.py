"""A model's config.json as a file: whether it can be read, and whether its values are of the right kinds.

transformers checks the kinds of some values for some classes, on the ranks. A value of another kind would switch off
the checks that read it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsdpo.runtime.files import LFS_POINTER, LFS_TEXT

Kind = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_COUNT: Kind = (lambda value: _is_whole(value) and value > 0, "a whole number above 0")
_WHOLE: Kind = (lambda value: value is None or _is_whole(value), "a whole number, or null")
_NUMBER: Kind = (lambda value: value is None or _is_number(value), "a number, or null")
_SWITCH: Kind = (lambda value: value is None or isinstance(value, bool), "true, false or null")
_BLOCK: Kind = (lambda value: value is None or isinstance(value, dict), "an object {...}, or null")
_TEXT: Kind = (lambda value: value is None or isinstance(value, str), "text, or null")
_NAMES: Kind = (lambda value: value is None or _is_names(value), "a list of names, or null")

# Every key that model/architecture.py, model/files.py and data/vocabulary.py read.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size"), _COUNT),
    **dict.fromkeys(("hidden_size", "n_embd", "num_attention_heads", "n_head", "num_hidden_layers"), _COUNT),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "head_dim", "max_window_layers"), _WHOLE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _WHOLE),
    **dict.fromkeys(("num_key_value_heads", "original_max_position_embeddings"), _WHOLE),
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "attn_logit_softcapping"), _NUMBER),
    **dict.fromkeys(("use_sliding_window", "alibi", "use_bidirectional_attention", "is_causal"), _SWITCH),
    **dict.fromkeys(("is_encoder_decoder", "tie_word_embeddings"), _SWITCH),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "text_config", "quantization_config"), _BLOCK),
    "layer_types": _NAMES,
}
_OF_ROPES: dict[str, Kind] = {
    "rope_type": _TEXT,
    "type": _TEXT,
    "factor": _NUMBER,
    "original_max_position_embeddings": _NUMBER,
}
_ROPES = ("rope_parameters", "rope_scaling")


def read_object(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object in a file, and what is wrong with it: the end of a sentence that begins with the file's name."""
    try:
        data = path.read_bytes()
        if data.startswith(LFS_POINTER):
            return {}, LFS_TEXT
        found = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read: {error}; take an undamaged copy"
    return (found, "") if isinstance(found, dict) else ({}, "holds no JSON object; take an undamaged copy")


def wrong_values(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys of a config.json whose values are of the wrong kind, each with the end of a sentence that says so."""
    return [
        (key, f"{place} is {json.dumps(value)}; it must be {words}") for key, place, value, words in _wrong(settings)
    ]


def _wrong(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, str]]:
    """Key, the same with the keys inside its block, value, and what is allowed."""
    for key, (fits, words) in KINDS.items():
        if key in settings and not fits(settings[key]):
            yield key, key, settings[key], words
    for name in _ROPES:
        block = settings.get(name)
        for place, rope in _blocks(name, block) if isinstance(block, dict) else ():
            for key, (fits, words) in _OF_ROPES.items():
                if key in rope and not fits(rope[key]):
                    yield name, f"{place}.{key}", rope[key], words


def _blocks(name: str, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of rotary positions, and those of each kind of layer where there are several."""
    yield name, block
    yield from ((f"{name}.{key}", value) for key, value in block.items() if isinstance(value, dict))
