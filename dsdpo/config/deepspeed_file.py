"""What the option `deepspeed` gives: a JSON file, or the name of one of ours, JSON text, or a mapping in the YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dsdpo.config.accelerate import foreign_settings
from dsdpo.config.aliases import did_you_mean
from dsdpo.errors import ConfigError, Problem
from dsdpo.runtime.files import LFS_POINTER, LFS_TEXT
from dsdpo.runtime.shipped import ds_configs

_HERE = "deepspeed in the run config"


def named(deepspeed: str | dict[str, Any]) -> str:
    """How messages call the option's value."""
    return deepspeed if isinstance(deepspeed, str) and not _is_text(deepspeed) else _HERE


def read_settings(deepspeed: str | dict[str, Any]) -> dict[str, Any]:
    """The option's mapping, or the JSON object in its text or in the file that it names.

    A word such as `zero3` is the name of a file in ds_configs/, unless there is a file of that name.

    Raises:
        ConfigError: an unknown name, a missing or malformed file, duplicate keys, or settings of accelerate.
    """
    if isinstance(deepspeed, dict):
        data = deepspeed
    elif _is_text(deepspeed):
        data = _json_object(deepspeed, _HERE)
    else:
        data = _read(_file_of(deepspeed), deepspeed)
    if found := foreign_settings(data):
        name = _HERE if named(deepspeed) == _HERE else f"deepspeed: {deepspeed}"
        raise _unreadable("accelerate-config", f"{name} {found}")
    return data


def _is_text(deepspeed: str) -> bool:
    return deepspeed.lstrip().startswith(("{", "["))


def _unreadable(code: str, text: str) -> ConfigError:
    return ConfigError(Problem(code, "deepspeed", text))


def is_ours(deepspeed: str) -> bool:
    """Whether the option is the name of a DeepSpeed JSON that comes with dsdpo, and no file here is called so."""
    return deepspeed in ds_configs() and not Path(deepspeed).is_file()


def _file_of(name: str) -> Path:
    """The file that the option names. Raises ConfigError for a word that is neither a file nor a name."""
    path, ours = Path(name), ds_configs()
    if is_ours(name):
        return ours[name]
    if path.name != name or path.suffix or path.is_file():
        return path
    close = did_you_mean(name, ours)
    text = (
        f"deepspeed: {name} is neither a file nor a name; {close + ' ' if close else ''}allowed: {', '.join(ours)}, or "
        "the path of a DeepSpeed JSON"
    )
    raise _unreadable("deepspeed-name", text)


def _read(file: Path, path: str) -> dict[str, Any]:
    """The object in a file that the option calls `path`. Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = (
            f"deepspeed: there is no file {path}; give a DeepSpeed JSON, or one of the names {', '.join(ds_configs())}"
        )
        raise _unreadable("deepspeed-file", text) from None
    except (OSError, ValueError) as error:
        raise _unreadable("deepspeed-file", f"deepspeed: {path} cannot be read: {error}") from None
    if text.startswith(LFS_POINTER.decode()):
        raise _unreadable("deepspeed-file", f"deepspeed: {path} {LFS_TEXT}")
    if not _is_text(text) and (mapping := _mapping(text)):
        if foreign_settings(mapping):
            return mapping
        remedy = "DeepSpeed's settings are JSON, or a mapping under `deepspeed:` in the run config"
        raise _unreadable("deepspeed-file", f"deepspeed: {path} is YAML; {remedy}")
    return _json_object(text, path)


def _json_object(text: str, name: str) -> dict[str, Any]:
    """The object in a JSON text. Raises ConfigError, also where a key is given twice."""
    duplicates: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        keys = [key for key, _ in pairs]
        duplicates.extend(key for key in seen if keys.count(key) > 1)
        return seen

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise _unreadable("deepspeed-file", f"{name} is no valid JSON: {error}{_json_remedy(error)}") from None
    except (ValueError, RecursionError) as error:
        raise _unreadable("deepspeed-file", f"{name} is no valid JSON: {error}") from None
    if duplicates:
        texts = [f"{name}: {key} is given twice in one block; keep one of them" for key in duplicates]
        raise ConfigError([Problem("deepspeed-duplicate", "deepspeed", one) for one in texts])
    if not isinstance(data, dict):
        found = {list: "a list", type(None): "null"}.get(type(data), json.dumps(data))
        raise _unreadable("deepspeed-file", f"{name} is {found}; a DeepSpeed JSON is an object {{...}}")
    return data


def _json_remedy(error: json.JSONDecodeError) -> str:
    """What to do about text that JSON does not have, but languages beside it."""
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if not error.doc.strip():
        return "; it is empty"
    if rest.startswith(("//", "/*", "#")):
        return "; JSON has no comments: delete it"
    if rest.startswith("'"):
        return "; JSON takes double quotes"
    if rest.startswith(("True", "False", "None")):
        return "; write true, false or null"
    if (before.endswith(",") and rest[:1] in "}]") or rest.startswith((",}", ",]")):
        return "; delete the comma before the bracket"
    return ""


def yaml_mapping(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in the text itself; empty where there is no such file, or another content."""
    if _is_text(path):
        return _mapping(path)
    if not path.endswith((".yaml", ".yml")):
        return {}
    try:
        return _mapping(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}


def _mapping(text: str) -> dict[str, Any]:
    """The mapping in a YAML text; empty where it is none."""
    try:
        found = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
