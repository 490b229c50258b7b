"""What the files of an adapter tell before anything is launched: whether it can be trained further."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsdpo.config.rules import adapter_problems
from dsdpo.errors import Problem
from dsdpo.model.config_file import read_object
from dsdpo.runtime.weights import Shapes, damage, shapes

_OPTION = "adapter_name_or_path"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def problems(name: str) -> list[Problem]:
    """Why the adapter in a folder cannot be trained further."""
    return [Problem(code, _OPTION, f"{_OPTION}: {text}") for code, text in _told(name)]


def _told(name: str) -> list[tuple[str, str]]:
    path = Path(name) / "adapter_config.json"
    files = sorted(Path(name).glob("adapter_model.*"))
    if not path.is_file() or not files:
        return [("adapter", f"{name} is no folder with adapter_config.json and adapter_model.safetensors")]
    settings, fault = read_object(path)
    if fault:
        return [("adapter", f"{path} {fault}")]
    if damaged := [f"{file} {fault}" for file in files if (fault := damage(file))]:
        return [("adapter", text) for text in damaged]
    remedy = (
        f"Name another adapter, or let `dsdpo export {name} --to DIR --merge` fold this one into its base and name DIR "
        "in model_name_or_path"
    )
    found = [("adapter", f"{path}: {problem}. {remedy}") for problem in adapter_problems(settings)]
    return found or [("adapter-incomplete", f"{name} {text}") for text in _matrices(settings, shapes(files))]


def _matrices(settings: Mapping[str, Any], stored: Shapes) -> list[str]:
    """What is wrong with the matrices of plain LoRA; a pickle has no header to tell."""
    whole = {name.replace(".default.", "."): shape for name, shape in stored.items()}
    modules = {name.removesuffix(end) for name in whole for end in (_A, _B) if name.endswith(end)}
    if stored and not modules:
        return [f"holds no LoRA matrices, but {', '.join(sorted(stored)[:3])}; name another adapter"]
    lost = sorted(name + end for name in modules for end in (_A, _B) if name + end not in whole)
    if lost:
        return [f"lacks {', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''}; take a complete copy"]
    rank = settings.get("r")
    ranks = {whole[name + _A][0] for name in modules}
    if modules and isinstance(rank, int) and not settings.get("rank_pattern") and ranks != {rank}:
        text = f"has matrices of rank {', '.join(map(str, sorted(ranks)))}, and adapter_config.json says r {rank}"
        return [f"{text}; take the adapter_config.json that they came with"]
    return []
