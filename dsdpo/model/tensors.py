"""Whether the tensors in the weight files are those of the model that config.json describes, by names and shapes.

transformers draws what is missing at random and leaves out what is too much, with a remark. The ranks look again
(`load.py`): a pickle has no header, and only a model's class knows every name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dsdpo.runtime.weights import EMBEDDINGS, Shapes

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)")
_COMPLETE = "take a complete copy"
_EMBEDDED = "word_embed_proj_dim"  # where it is there, embeddings are narrower than the layers


def tensor_problems(
    settings: Mapping[str, Any], shapes: Shapes, promised: Collection[str] = (), narrow: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Code, and the end of a sentence that begins with the folder's name.

    Args:
        settings: the content of config.json.
        shapes: of all tensors in the files; without any, nothing can be told.
        promised: names of tensors in the files' index.
        narrow: matrices that are stored in 8 bits or fewer.
    """
    if not shapes:
        return []
    found = [*_embedding(settings, shapes), *_layers(settings, shapes)]
    if not found and (lost := sorted(set(promised) - set(shapes))):
        found.append(("weights-incomplete", f"lacks {_some(lost)}, which its index names; {_COMPLETE}"))
    if narrow and not settings.get("quantization_config"):
        text = (
            f"has quantized weights ({_some(list(narrow))}), without their scales in config.json: name its full model, "
            "and set quantization_bit: 4 to quantize that on loading"
        )
        found.append(("model-quantized", text))
    return found


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _embedding(settings: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    found = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight").endswith(EMBEDDINGS)}
    if not found:
        text = f"has no token embedding in its weight files, which hold {_some(sorted(shapes))}"
        yield "weights-incomplete", f"{text}; take a complete copy of a model of this type"
        return
    for name, shape in found.items():
        width, rows = settings.get("hidden_size", settings.get("n_embd")), settings.get("vocab_size")
        width = settings.get(_EMBEDDED) or width
        for key, wanted, size in (("vocab_size", rows, shape[0]), ("hidden_size", width, shape[-1])):
            if isinstance(wanted, int) and size != wanted:
                text = f"has weights of another model: {name} is {list(shape)}, and {key} in config.json is {wanted}"
                yield "weights-mismatch", f"{text}; take the config.json that they came with"


def _layers(settings: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    """All layers of the models that can be trained have the same tensors, and as many are there as config.json says."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if part := _LAYER.search(name):
            layers.setdefault(int(part[1]), {})[part[2]] = shape
    if not layers:
        return
    count = settings.get("num_hidden_layers", settings.get("n_layer"))
    if isinstance(count, int) and max(layers) >= count:
        text = f"has weights of {max(layers) + 1} layers, and num_hidden_layers in config.json is {count}"
        yield "weights-mismatch", f"{text}; take the config.json that they came with"
    every = {name: shape for layer in layers.values() for name, shape in layer.items()}
    there = max(layers) + 1 if not isinstance(count, int) else count
    lost = [f"{name} of layer {i}" for i in range(there) for name in sorted(every) if name not in layers.get(i, {})]
    if lost:
        yield "weights-incomplete", f"lacks {_some(lost)}. They would be drawn at random; {_COMPLETE}"
    odd = sorted({f"{name} of layer {i}" for i, one in layers.items() for name in one if one[name] != every[name]})
    if odd:
        yield "weights-mismatch", f"has layers of different shapes: {', '.join(odd[:3])}; take an undamaged copy"
