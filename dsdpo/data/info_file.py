"""dataset_info.json: reading it, and the keys of its entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsdpo.config.aliases import did_you_mean
from dsdpo.data.folders import EntryProblem
from dsdpo.data.formats.detect import COLUMNS, TAGS
from dsdpo.errors import Problem

_KEYS: dict[str, type] = {
    "hf_hub_url": str,
    "ms_hub_url": str,
    "om_hub_url": str,
    "file_name": str,
    "file_sha1": str,
    "formatting": str,
    "ranking": bool,
    "columns": dict,
    "tags": dict,
    "split": str,
    "subset": str,
    "revision": str,
    "folder": str,
    "num_samples": int,
    "allow_empty_rejected": bool,
    "ignore_columns": list,
}
_UNSUPPORTED = {
    "script_url": "loading scripts are not run; export the rows to a .jsonl file and give file_name",
    "cloud_file_name": "copy the file into dataset_dir and give file_name",
    "load_from": "give hf_hub_url, ms_hub_url or file_name alone",
}
_UNSUPPORTED_COLUMNS = {
    "images": "only text is trained on",
    "videos": "only text is trained on",
    "audios": "only text is trained on",
}


def read_info(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The entries of a dataset_info.json by name, and what is wrong with the file; nothing where there is none."""
    if not path.exists():
        return {}, []
    try:
        info = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except (ValueError, OSError) as error:
        return {}, [Problem("dataset-info", "dataset_dir", f"{path} cannot be read: {error}")]
    if not isinstance(info, dict):
        text = f"{path} must hold one JSON object, name -> entry; it holds a {type(info).__name__}"
        return {}, [Problem("dataset-info", "dataset_dir", text)]
    return info, []


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object; delete one of them")
        found[key] = value
    return found


def check_keys(where: str, described: dict[str, Any]) -> None:
    """Raise EntryProblem for a key of an entry that is not known, or whose value is of another kind."""
    for key, value in described.items():
        if key in _UNSUPPORTED:
            raise EntryProblem(f"{where}: {key} is not supported; {_UNSUPPORTED[key]}")
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS) or f"known keys are {', '.join(_KEYS)}"
            raise EntryProblem(f"{where}: unknown key {key!r}; {hint}")
        kind = _KEYS[key]
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise EntryProblem(f"{where}: {key} must be a {kind.__name__}, not {value!r}")
    samples = described.get("num_samples")
    if samples is not None and samples < 1:
        raise EntryProblem(f"{where}: num_samples must be at least 1, not {samples}")
    for key, known in (("columns", COLUMNS), ("tags", TAGS)):
        for inner, value in (described.get(key) or {}).items():
            if key == "columns" and value == "":
                continue
            if inner in _UNSUPPORTED_COLUMNS:
                raise EntryProblem(f"{where}: {key}.{inner} is not supported; {_UNSUPPORTED_COLUMNS[inner]}")
            if inner not in known:
                hint = did_you_mean(inner, known) or f"known are {', '.join(known)}"
                raise EntryProblem(f"{where}: unknown key {key}.{inner}; {hint}")
            if not isinstance(value, str):
                raise EntryProblem(f"{where}: {key}.{inner} must be a string, not {value!r}")
    ignored = described.get("ignore_columns") or ()
    if not all(isinstance(name, str) for name in ignored):
        raise EntryProblem(f"{where}: ignore_columns must be a list of column names, not {ignored!r}")
    for inner, value in (described.get("columns") or {}).items():
        if value in ignored:
            raise EntryProblem(f"{where}: {value} stands in columns.{inner} and in ignore_columns; take one out")
