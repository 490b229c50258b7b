"""A YAML file plus `--key value` becomes a RunConfig; everything wrong with it is collected, not raised.

`preflight` joins these problems with those of the data, the model and the cluster request and raises once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from dsdpo.config.aliases import suggest
from dsdpo.config.earlier import earlier_values, remark
from dsdpo.config.options import options, value_kinds
from dsdpo.config.schema import Checked, RunConfig
from dsdpo.errors import Problem
from dsdpo.runtime.rundir import RunDir

COMMAND_LINE = "command line"


@dataclass
class LoadResult:
    """What could be read of a run config.

    `config` holds every sound value; a key in `faulty` (wrong or missing) stands at its default or empty
    there, so a check looks at `faulty` first. `config` is None when the file itself cannot be read. `origins`
    tells where a given key was set: `run.yaml:3` or `command line`. `remark` says which defaults of an earlier version
    count on.
    """

    config: RunConfig | None
    problems: list[Problem]
    faulty: frozenset[str] = frozenset()
    origins: dict[str, str] = field(default_factory=dict)
    remark: str = ""

    def where(self, key: str) -> str:
        """Where `key` got its value, for a message."""
        return self.origins.get(key, "default")


def load(path: str | Path, overrides: Sequence[str] = (), fresh: bool = False) -> LoadResult:
    """Read `path`, apply `--key value` overrides and validate key by key; a user's mistake raises nothing.

    Args:
        fresh: whether what output_dir holds will be moved aside.
    """
    values, lines, problems = read_yaml(path)
    changes, command_problems = parse_overrides(overrides)
    problems += command_problems
    if values is None:
        return LoadResult(None, problems)
    origins = {key: f"{path}:{lines[key]}" if key in lines else str(path) for key in values}
    origins |= dict.fromkeys(changes, COMMAND_LINE)
    values |= changes
    problems += _take_unknown(values, origins)
    kept = earlier_values(values, fresh)
    config, faulty, value_problems = _validate(values | kept, origins, str(path))
    if config is not None and _is_recorded(path):
        origins = {
            key: place for key, place in origins.items() if place == COMMAND_LINE or not _is_default(config, key)
        }
    return LoadResult(config, problems + value_problems, faulty, origins, remark(kept, config) if kept else "")


def _is_recorded(path: str | Path) -> bool:
    """Whether a run has written this file: it names every option, also those that nobody has set."""
    return Path(path).name == RunDir(Path(path).parent).run_config.name


def _is_default(config: RunConfig, key: str) -> bool:
    return bool(getattr(config, key) == RunConfig.model_fields[key].get_default(call_default_factory=True))


# --- YAML ---


class _Loader(yaml.SafeLoader):
    """Plain scalars become numbers, booleans, null or text by the rules of `_SCALARS`; a date stays text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A key that stands twice is an error, as in a JSON file."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def _integer(self, node: yaml.ScalarNode) -> int:
        """`010` is ten, as in YAML 1.2; YAML 1.1 would read it as octal."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 16 if "x" in text else 10)


# Each takes the whole of a scalar, so that `5e-6_beta0.1` and `3e8f21b` are text. `1:30` is text, no base 60.
_SCALARS = (
    ("bool", r"(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(\d[\d_]*|0x[\da-fA-F]+)", "-+0123456789"),
    ("float", r"[-+]?(\d[\d_]*(\.\d*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(?i:inf))|\.(?i:nan)", "-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag == "tag:yaml.org,2002:merge"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_form})\Z"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader._integer)
_LIST = "tag:yaml.org,2002:seq"
_NUMERIC = (int, float, bool)
_NOT_FINITE = ("inf", "infinity", "nan")  # pydantic takes these texts for numbers
_AS_TYPED = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "str"))


def read_yaml(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, int], list[Problem]]:
    """Values and line numbers of a file's top-level keys, and what is wrong with the file.

    The values are None when nothing can be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        text = f"{path}: {reason}; give the path of a YAML run config right after the command"
        if isinstance(error, UnicodeDecodeError):
            text = f"{path}: no UTF-8 text (byte {error.start + 1}); save it as UTF-8"
        return None, {}, [Problem("config-file", "", text)]
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {}, []
        if not isinstance(node, yaml.MappingNode):
            text = f"{path}: found no keys; a run config is lines of `key: value`"
            return None, {}, [Problem("config-file", "", text)]
        keys = [(key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        problems = _duplicates(keys, path)
        values = _values_of(node, loader)
    except yaml.YAMLError as error:
        return None, {}, [Problem("yaml", "", f"{path}: not valid YAML: {_one_line(error)}")]
    except RecursionError:
        return None, {}, [Problem("yaml", "", f"{path}: blocks are nested too deeply, or contain themselves")]
    return values, dict(keys), problems


def _values_of(node: yaml.MappingNode, loader: _Loader) -> dict[str, Any]:
    """The options of a file. Raises YAMLError."""
    loader.flatten_mapping(node)
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "an option's name must be text", key.start_mark)
    return {key.value: _value_of(key.value, value, loader) for key, value in node.value}


def _value_of(key: str, node: yaml.Node, loader: _Loader) -> Any:
    """The value of an option. Text, also in a list, is what was typed: `1_000`, `on` and `0x1F` stay so."""
    if _base(key) not in _NUMERIC:
        if isinstance(node, yaml.ScalarNode) and node.tag in _AS_TYPED:
            return node.value
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST and not _holds_numbers(key):
            return [_value_of(key, item, loader) for item in node.value]
    return loader.construct_object(node, deep=True)


def _duplicates(keys: list[tuple[str, int]], path: str | Path) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for key, line in keys:
        if key in first:
            text = f"{path}:{line}: {key} is already set on line {first[key]}; keep one of them"
            problems.append(Problem("duplicate-option", key, text))
        first.setdefault(key, line)
    return problems


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + str(getattr(error, "problem", None) or error).replace("\n", " ")


# --- command line ---


def parse_overrides(tokens: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """`--key value` and `--key=value` as a dict of values, and what is wrong with them."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not re.match(r"--[A-Za-z]", token):
            text = f"{COMMAND_LINE}: found {token!r}; options are written `--key value` or `--key=value`"
            problems.append(Problem("stray-argument", "", text))
            continue
        key, equals, text = token[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                hint = f", such as --{key} true" if _base(key) is bool else ""
                text = f"{COMMAND_LINE}: --{key} has no value; write `--{key} value`{hint}"
                problems.append(Problem("no-value", key, text))
                continue
            text = rest.pop(0)
        if key in values:
            text = f"{COMMAND_LINE}: --{key} is given twice; keep one of them"
            problems.append(Problem("duplicate-option", key, text))
            continue
        values[key] = _parse_value(key, text)
    return values, problems


def _parse_value(key: str, text: str) -> Any:
    """By YAML's rules, but text options stay as typed; of these, only a list is more than text."""
    is_text = _base(key) not in _NUMERIC
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return text if text.strip() else None
        if _is_text_alone(key, node):
            return text
        value = _value_of(key, node, loader)
    except (yaml.YAMLError, RecursionError):
        return text
    is_null = value is None and not text.startswith(("&", "!"))  # YAML's marks, of an empty value
    return value if not is_text or is_null or isinstance(value, (list, dict)) else text


def _is_text_alone(key: str, node: yaml.Node) -> bool:
    """Whether what looks like a list or a mapping is the text of an option that takes none."""
    field = RunConfig.model_fields.get(key)
    kinds = {get_origin(kind) for kind in value_kinds(field)} if field else set()
    is_list, is_mapping = isinstance(node, yaml.SequenceNode), isinstance(node, yaml.MappingNode)
    takes_list = list in kinds or _base(key) in _NUMERIC
    return (is_list and not takes_list) or (
        is_mapping and (dict not in kinds or not getattr(node, "flow_style", False))
    )


def _holds_numbers(key: str) -> bool:
    return get_args(_base(key)) == (float,)


def _base(key: str) -> Any:
    field = RunConfig.model_fields.get(key)
    return value_kinds(field)[0] if field else None


# --- values ---


def _take_unknown(values: dict[str, Any], origins: dict[str, str]) -> list[Problem]:
    problems = []
    for key in [key for key in values if key not in RunConfig.model_fields]:
        del values[key]
        text = f"{origins[key]}: unknown option {key}; {suggest(key, RunConfig.model_fields)}"
        problems.append(Problem("unknown-option", key, text))
    return problems


def _validate(
    values: dict[str, Any], origins: dict[str, str], path: str
) -> tuple[RunConfig, frozenset[str], list[Problem]]:
    """The config of the sound values, the faulty keys, and a problem for each of these."""
    faulty: dict[str, Problem] = {}
    for key in RunConfig.model_fields:
        if problem := _look(key, values, origins, path):
            faulty[key] = problem
    sound = {key: value for key, value in values.items() if key not in faulty}
    while True:
        try:
            config = RunConfig.model_validate(_placeholders(faulty) | sound)
            return config, frozenset(faulty), list(faulty.values())
        except ValidationError as error:
            for key in dict.fromkeys(str(detail["loc"][0]) for detail in error.errors()):
                faulty[key] = _wrong(key, sound.pop(key), origins)


def _look(key: str, values: dict[str, Any], origins: dict[str, str], path: str) -> Problem | None:
    """What pydantic lets pass or says badly: a missing or empty required key, `true` for a number,
    infinity."""
    required = options()[key].default == "required"
    if key not in values:
        text = f"{path}: {key} is missing; add a line `{key}: ...` ({options()[key].allowed})"
        return Problem("missing-option", key, text) if required else None
    value = values[key]
    items = value if isinstance(value, list) else [value]
    bad = (required and value in ("", [])) or any(_is_no_number(key, item) for item in items)
    return _wrong(key, value, origins) if bad else None


def _is_no_number(key: str, item: Any) -> bool:
    if isinstance(item, str) and (_base(key) in _NUMERIC or _holds_numbers(key)):
        return any(part.strip().lower().lstrip("+-") in _NOT_FINITE for part in item.split(","))
    return (isinstance(item, bool) and _base(key) is not bool) or (isinstance(item, float) and not math.isfinite(item))


def _wrong(key: str, value: Any, origins: dict[str, str]) -> Problem:
    found = "empty" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    marks = (mark for mark in options()[key].field.metadata if isinstance(mark, Checked) and isinstance(value, str))
    hint = "".join(mark.hint(value) for mark in marks)
    return Problem("value", key, f"{origins[key]}: {key} is {found}; {hint}allowed: {options()[key].allowed}")


def _placeholders(faulty: dict[str, Problem]) -> dict[str, Any]:
    required = [key for key in faulty if options()[key].default == "required"]
    return {key: "" if _base(key) is str else [] for key in required}
