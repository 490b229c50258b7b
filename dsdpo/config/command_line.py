"""Options on the command line: `--key value`, `--key=value`, bare `--key` for a switch, and `key=value`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml

from dsdpo.config.options import NUMERIC, base_kind, is_switch, value_kinds
from dsdpo.config.run_file import Loader, value_of
from dsdpo.config.schema import RunConfig
from dsdpo.config.translation.translate import COMMAND_LINE, is_known
from dsdpo.errors import Problem

_OPTION = re.compile(r"--[A-Za-z]")
_ASSIGNMENT = re.compile(r"([A-Za-z]\w*)=")
_FILES = (".yaml", ".yml")  # of run configs
_BOOLEAN = re.compile(r"(?i:true|false|yes|no|on|off|[ytnf10])\Z")


def parse_overrides(tokens: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """The options as a dict of values, and what is wrong with them.

    As in transformers' parser, dashes in a name are underscores, `--no_key` switches a switch off, and a list may be
    several words.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, words in groups(tokens):
        if name is None:
            text = f"{COMMAND_LINE}: found {words[0]!r}; options are written `--key value` or `--key=value`"
            problems.append(Problem("stray-argument", "", text))
            continue
        key, value, fault = _option(name, words)
        if not fault and key in values:
            fault = Problem("duplicate-option", key, f"{COMMAND_LINE}: --{key} is given twice; keep one of them")
        if fault:
            problems.append(fault)
        else:
            values[key] = value
    return values, problems


def separate(tokens: Sequence[str], own: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Arguments of a command, and options of the run, which may stand among each other.

    Args:
        tokens: what follows the command's name.
        own: option of the command -> how many values it takes.
    """
    arguments: list[str] = []
    options: list[str] = []
    words = list(tokens)
    while words:
        token = words.pop(0)
        name, equals, _ = token.partition("=")
        if name in own:
            arguments += [token] + ([] if equals else words[: own[name]])
            words = words if equals else words[own[name] :]
        elif _OPTION.match(token) or _is_assignment(token):
            group = [token]
            while words and _takes(group, words[0]):
                group.append(words.pop(0))
            options += group
        else:
            arguments.append(token)
    return arguments, options


def groups(tokens: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Each option with its words; a word that belongs to none stands alone, after None."""
    found: list[list[str]] = []
    for token in tokens:
        if _OPTION.match(token):
            found.append([token])
        elif found and _OPTION.match(found[-1][0]) and _takes(found[-1], token):
            found[-1].append(token)
        elif _is_assignment(token):
            found.append([f"--{token}"])
        else:
            found.append([token])
    return [_named(group) for group in found]


def _named(group: list[str]) -> tuple[str | None, list[str]]:
    if not _OPTION.match(group[0]):
        return None, group
    name, equals, text = group[0][2:].partition("=")
    return name, [text] if equals else group[1:]


def _takes(group: list[str], token: str) -> bool:
    """Whether a word is a value of the option before it; `group` is that option with its words so far."""
    if "=" in group[0] or token.startswith("--"):
        return False
    key = _key(group[0][2:])
    if is_switch(key):
        return len(group) == 1 and (bool(_BOOLEAN.match(token)) or token in get_args(base_kind(key)))
    is_other = token.endswith(_FILES) or _is_assignment(token)
    if base_kind(key) is None and is_other:
        return False  # another trainer's switch, and what stands after it
    return len(group) == 1 or (takes_words(key) and not is_other)


def _is_assignment(token: str) -> bool:
    """Whether a word is `key=value` with the name of an option, as `llamafactory-cli` takes it."""
    found = _ASSIGNMENT.match(token)
    return found is not None and _is_option(found[1])


def takes_words(key: str) -> bool:
    """Whether an option is a list, which may be several words."""
    return get_origin(base_kind(key)) is list or key in ("lora_target_modules", "datasets")


def _key(name: str) -> str:
    """An option's name as the schema writes it."""
    return name.replace("-", "_") if name not in RunConfig.model_fields else name


def _option(name: str, words: list[str]) -> tuple[str, Any, Problem | None]:
    """Name and value of an option, and what is wrong with it."""
    key = _key(name)
    if len(words) > 1:
        return key, [_parse_value(key, word) for word in words], None
    if words:
        return key, _parse_value(key, words[0]), None
    without = key.removeprefix("no_")
    if without != key and not _is_option(key) and (is_switch(without) or is_known(without)):
        return without, False, None
    if is_switch(key) or (base_kind(key) is None and is_known(key)):
        return key, True, None
    return key, None, Problem("no-value", key, f"{COMMAND_LINE}: --{key} has no value; write `--{key} value`")


def _is_option(key: str) -> bool:
    return key in RunConfig.model_fields or is_known(key)


def _parse_value(key: str, text: str) -> Any:
    """By YAML's rules, but text options stay as typed; of these, only a list is more than text."""
    is_text = base_kind(key) not in NUMERIC
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return text if text.strip() else None
        if _is_text_alone(key, node):
            return text
        value = value_of(key, node, loader)
    except (yaml.YAMLError, RecursionError):
        return text
    is_null = value is None and not text.startswith(("&", "!"))  # YAML's marks, of an empty value
    return value if not is_text or is_null or isinstance(value, (list, dict)) else text


def _is_text_alone(key: str, node: yaml.Node) -> bool:
    """Whether what looks like a list or a mapping is the text of an option that takes none."""
    field = RunConfig.model_fields.get(key)
    kinds = {get_origin(kind) for kind in value_kinds(field)} if field else set()
    is_list, is_mapping = isinstance(node, yaml.SequenceNode), isinstance(node, yaml.MappingNode)
    takes_list = list in kinds or base_kind(key) in NUMERIC or takes_words(key)
    return (is_list and not takes_list) or (
        is_mapping and (dict not in kinds or not getattr(node, "flow_style", False))
    )
