"""The tensors of a checkpoint held against the model that they are to be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from dsdpo.errors import CheckpointError

_NAMED = 4  # so many tensors of a kind are named in an error


@dataclass(frozen=True)
class _Expected:
    """What a model consists of.

    Attributes:
        tensors: what has to be saved, by name; a tied tensor stands under its first name only.
        ties: other name of a tied tensor -> its first name.
        others: names that may be in a checkpoint and are not saved.
    """

    tensors: dict[str, torch.Tensor]
    ties: dict[str, str]
    others: set[str]


def _expected(model: nn.Module) -> _Expected:
    """The whole model; of a PEFT model, what is trained."""
    tensors: dict[str, torch.Tensor] = {}
    ties, others = {}, set()
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(model, peft.PeftModel) and not tensor.requires_grad:
            others.add(name)
        elif first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor
        else:
            ties[name] = first[id(tensor)]
    return _Expected(tensors, ties, others)


def fit(state: dict[str, Any], model: nn.Module, states: Path, config: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under the model's names and in its precision.

    Args:
        state: by name; a prefix that all names share falls away.
        model: on the meta device.
        states, config: the two folders, for the error.

    Raises:
        CheckpointError: a tensor is missing or left over, has another shape, or differs from the one it is tied to.
    """
    expected = _expected(model)
    prefix = _prefix(state, expected.tensors)
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    for alias, main in expected.ties.items():
        if alias in named:
            named.setdefault(main, named[alias])
    problems = _misfits(named, state, expected, model, prefix)
    if problems:
        raise CheckpointError(
            f"{states} is no checkpoint of the model in {config}:\n  "
            + "\n  ".join(problems)
            + "\nname the model that was trained with --model; nothing was written"
        )
    return {name: named.pop(name).contiguous().to(like.dtype, copy=True) for name, like in expected.tensors.items()}


def _prefix(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before the model's own names in most of `names`; the shortest of those that fit equally well."""
    own = set(wanted)
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def _misfits(
    named: dict[str, Any], state: dict[str, Any], expected: _Expected, model: nn.Module, prefix: str
) -> list[str]:
    """What keeps a checkpoint from being the model, a line for each kind."""
    tensors, ties = expected.tensors, expected.ties
    used = {_identity(named[name]) for name in tensors if name in named}
    known = {prefix + name for name in (*tensors, *ties, *expected.others)}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    kinds = {
        "missing": [name for name in tensors if name not in named],
        "unexpected": [
            name
            for name, tensor in state.items()
            if name not in known and _identity(tensor) not in used and not any(re.search(i, name) for i in ignored)
        ],
        "of another shape": [
            f"{name} {tuple(named[name].shape)}, not {tuple(like.shape)}"
            for name, like in tensors.items()
            if name in named and named[name].shape != like.shape
        ],
        "tied by the config, but different": [
            f"{alias} and {main}"
            for alias, main in ties.items()
            if alias in named and not _same(named[alias], named[main])
        ],
    }
    return [f"{kind}: {some(found)}" for kind, found in kinds.items() if found]


def _identity(tensor: Any) -> int:
    """Equal for names that share one tensor."""
    return tensor.data_ptr() if isinstance(tensor, torch.Tensor) else id(tensor)


def _same(one: Any, other: Any) -> bool:
    return _identity(one) == _identity(other) or torch.equal(one.contiguous(), other.contiguous())


def some(names: list[str]) -> str:
    """The first few, and how many more."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
