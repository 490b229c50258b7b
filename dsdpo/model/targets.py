"""Which modules the names of `lora_target` mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dsdpo.config.aliases import did_you_mean
from dsdpo.config.rules import HEAD_NAMES
from dsdpo.errors import Problem

_EMBEDDINGS = ("wte", "wpe", "embd")


def modules_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """Names of linear layers and of embeddings, by the names and shapes of a model's tensors."""
    matrices = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    modules = [name for name in matrices if name + ".weight" in shapes]
    embeddings = [name for name in modules if "embed" in _last(name) or _last(name) in _EMBEDDINGS]
    return sorted(set(modules) - set(embeddings)), embeddings


def target_problems(
    targets: Sequence[str], linear: Iterable[str], embeddings: Iterable[str], prefix: str = ""
) -> list[Problem]:
    """Names of `lora_target` that match no module: PEFT would leave them out without a word, as long as others match.

    Args:
        targets: ends of module names, as PEFT takes them; `all` matches every linear layer.
        linear, embeddings: names of the model's modules; without linear ones nothing can be told.
        prefix: what the model's names begin with, where these come from files, which may leave it out.

    Returns:
        One problem at most. The output head is the business of the rules.
    """
    linear = [name for name in linear if _last(name) not in HEAD_NAMES]
    known = [_full(name, prefix) for name in (*linear, *embeddings)]
    if "all" in targets or not linear:
        return []
    lost = [
        target
        for target in targets
        if _last(target) not in HEAD_NAMES and not any(f".{name}".endswith(f".{target}") for name in known)
    ]
    if not lost:
        return []
    names = sorted({_last(name) for name in linear})
    hints = [hint for target in lost if (hint := did_you_mean(_last(target), names))]
    text = (
        f"lora_target names {', '.join(lost)}, which no linear layer of the model is called; {' '.join([*hints, ''])}"
        f"its linear layers are {', '.join(names)}, and `all` means every one of them"
    )
    return [Problem("lora-target-unknown", "lora_target", text)]


def _full(name: str, prefix: str) -> str:
    return name if not prefix or name.startswith(f"{prefix}.") else f"{prefix}.{name}"


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
