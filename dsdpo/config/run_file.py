"""The YAML of a run config: what its scalars mean, its options with their lines, and what is wrong with the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dsdpo.config.options import NUMERIC, base_kind, holds_numbers
from dsdpo.errors import Problem

IN_PLACE = "run config"  # how messages call one that is given as text


class _Twice(yaml.constructor.ConstructorError):
    """A key that stands twice in a block."""


class Loader(yaml.SafeLoader):
    """Plain scalars become numbers, booleans, null or text by the rules of `_SCALARS`; a date stays text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A key that stands twice is an error, as in a JSON file."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise _Twice(None, None, f"{key.value} is given twice in one block", key.start_mark)
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
Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag == "tag:yaml.org,2002:merge"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form, _first in _SCALARS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_form})\Z"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", Loader._integer)
_LIST = "tag:yaml.org,2002:seq"
_AS_TYPED = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "str"))


def is_text(path: str | Path) -> bool:
    """Whether what stands in the place of a run config's path is its content, as a JSON object."""
    return str(path).lstrip().startswith("{")


def read_yaml(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, int], list[Problem]]:
    """Values and line numbers of a file's top-level keys, and what is wrong with the file.

    The values are None when nothing can be read. Of a run config that is given as text there are no line numbers.
    """
    if is_text(path):
        values, _, problems = _read(str(path), IN_PLACE)
        return values, {}, problems
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        text = f"{path}: {reason}; give the path of a YAML run config right after the command"
        if isinstance(error, UnicodeDecodeError):
            text = f"{path}: no UTF-8 text (byte {error.start + 1}); save it as UTF-8"
        return None, {}, [Problem("config-file", "", text)]
    return _read(text, path)


def _read(text: str, path: str | Path) -> tuple[dict[str, Any] | None, dict[str, int], list[Problem]]:
    """The same of a text; messages call it `path`."""
    try:
        loader = Loader(text)
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
        return None, {}, [_yaml_problem(error, path, text)]
    except RecursionError:
        return None, {}, [Problem("yaml", "", f"{path}: blocks are nested too deeply, or contain themselves")]
    return values, dict(keys), problems


def _values_of(node: yaml.MappingNode, loader: Loader) -> dict[str, Any]:
    """The options of a file. Raises YAMLError."""
    loader.flatten_mapping(node)
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "an option's name must be text", key.start_mark)
    return {key.value: value_of(key.value, value, loader) for key, value in node.value}


def value_of(key: str, node: yaml.Node, loader: Loader) -> Any:
    """The value of an option. Text, also in a list, is what was typed: `1_000`, `on` and `0x1F` stay so."""
    if base_kind(key) not in NUMERIC:
        if isinstance(node, yaml.ScalarNode) and node.tag in _AS_TYPED:
            return node.value
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST and not holds_numbers(key):
            return [value_of(key, item, loader) for item in node.value]
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


# What the parser says -> what to do. Where it says it of a later line, its context is the line that is meant.
_REMEDIES = (
    (r"'\\t' that cannot start", "there is a tab; indent with spaces, and put one after a colon"),
    (r"'[%@`]' that cannot start|undefined alias|expected alphabetic|unhashable", "put the text in quotes"),
    (r"constructor for the tag '(.+)'", "tags such as this are not read; write the value itself, or text in quotes"),
    (r"another document", "a file holds one run; delete the line `---` and what follows it"),
    (
        r"mapping values are not allowed",
        "put text that holds `: ` in quotes; begin each option in the first column",
    ),
    (r"could not find expected ':'", "write `key: value`, with a space after the colon"),
    (r"unexpected end of stream|, but got '", "a quote or a bracket is not closed"),
    (r"expected '<document start>'|expected <block end>", "write lines of `key: value`, all from the first column on"),
    (r"for merging", "`<<:` takes a block of options"),
)


def _yaml_problem(error: yaml.YAMLError, path: str | Path, text: str) -> Problem:
    """What the YAML parser found, the line that it is about, and what to do."""
    said, mark = str(getattr(error, "problem", None) or error), getattr(error, "problem_mark", None)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem("yaml", "", f"{path}:{line}: the character {error.character:#x} is no text; delete it")
    if isinstance(error, _Twice) and mark is not None:
        return Problem("duplicate-option", "", f"{path}:{mark.line + 1}: {said}; keep one of them")
    remedy = next((remedy for form, remedy in _REMEDIES if re.search(form, said)), "")
    context = getattr(error, "context_mark", None)
    if context is not None and re.search("could not find|end of stream|stream end", said):
        mark = context
    place = f":{mark.line + 1}: not valid YAML at column {mark.column + 1}" if mark else ": not valid YAML"
    said = said.replace("\n", " ").replace("tag:yaml.org,2002:", "!!")
    return Problem("yaml", "", f"{path}{place}: {said}{'; ' if remedy else ''}{remedy}")
