"""How many token ids a model has embeddings for, told from its files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dsdpo.runtime.weights import EMBEDDINGS, shapes


def embedding_rows(model_name_or_path: str, adapter: str | None, revision: str | None = None) -> tuple[int, str] | None:
    """Rows of the token embedding, and the file that says so; None where no file tells.

    The weights' own shape goes before what config.json says, and an adapter's own embeddings go before the model's.
    """
    folders = [Path(name) for name in (adapter, model_name_or_path) if name]
    for folder in folders:
        found = [(rows, str(path)) for path in _weight_files(folder) for rows in _embeddings(path)]
        if found:
            return max(found)
    path = folders[-1] / "config.json" if folders[-1].is_dir() else _cached_config(model_name_or_path, revision)
    if path is None:
        return None
    config = _json(path)
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else {}).get("vocab_size", config.get("vocab_size"))
    return (size, str(path)) if isinstance(size, int) else None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are loaded: others beside them may be left from before the embedding was resized."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    named = _json(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(named, dict):
        return sorted({folder / str(name) for name in named.values()})
    return sorted(folder.glob("*.safetensors"))


def _embeddings(path: Path) -> Iterator[int]:
    """Rows of each token embedding whose shape the header of a safetensors file gives."""
    try:
        found = shapes([path])
    except (SafetensorError, OSError, ValueError):
        return  # damaged weights are told elsewhere
    for name, shape in found.items():
        if name.removesuffix(".weight").endswith(EMBEDDINGS) and name.endswith(".weight"):
            yield shape[0]


def _cached_config(hub_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
