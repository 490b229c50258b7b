"""What `schema.RunConfig` says about each option, as text for --help, error messages and docs."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dsdpo.config.fields import Checked, OneOf, ResumePolicy, Switch, resume_policy
from dsdpo.config.schema import RunConfig

_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NUMERIC = (int, float, bool)  # kinds whose values are more than text
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Option:
    """One field of RunConfig.

    `group` is the ruler it stands under in the schema, `default` the default as YAML writes it ("required" when there
    is none), `doc` its docstring on one line, `resume` whether a checkpoint may be continued with another value.
    """

    name: str
    group: str
    field: FieldInfo
    default: str
    doc: str
    resume: ResumePolicy

    @property
    def allowed(self) -> str:
        """Type and bounds in words."""
        return allowed(self.field)


@lru_cache(maxsize=1)
def options() -> dict[str, Option]:
    """name -> Option, in the order of the schema."""
    groups = _groups()
    return {
        name: Option(
            name=name,
            group=groups[name],
            field=field,
            default=_default(field),
            doc=" ".join((field.description or "").split()),
            resume=resume_policy(field),
        )
        for name, field in RunConfig.model_fields.items()
    }


def allowed(field: FieldInfo) -> str:
    """Type and bounds of a field in words, such as `a whole number, at least 1, or empty`."""
    kinds = value_kinds(field)
    named = [kind for kind in kinds if kind is not type(None)]
    marks = [mark for mark in field.metadata if isinstance(mark, OneOf)]
    text = _values_text(marks[0].names()) if marks else " or ".join(_kind_text(kind) for kind in named)
    text = next((mark.words for mark in field.metadata if isinstance(mark, Checked)), text)
    if len(named) > 1:
        text = text.replace("only ", "")
    for bound in field.metadata:
        for attribute, words in _BOUNDS.items():
            if hasattr(bound, attribute):
                text += f", {words} {_number_text(getattr(bound, attribute))}"
    return text + (", or empty" if type(None) in kinds else "")


def value_kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The alternatives of a field's annotation: `int | None` gives (int, NoneType)."""
    annotation = field.annotation
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def base_kind(name: str) -> Any:
    """The first alternative of an option's annotation; None for an unknown name."""
    field = RunConfig.model_fields.get(name)
    return value_kinds(field)[0] if field else None


def is_switch(name: str) -> bool:
    """Whether an option may stand on the command line without a value."""
    field = RunConfig.model_fields.get(name)
    return base_kind(name) is bool or (field is not None and any(isinstance(mark, Switch) for mark in field.metadata))


def holds_numbers(name: str) -> bool:
    """Whether an option is a list of numbers."""
    return get_args(base_kind(name)) == (float,)


def _values_text(values: Iterable[str]) -> str:
    found = list(values)
    return f"one of {', '.join(found)}" if len(found) > 1 else f"only {found[0]}"


def _number_text(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _kind_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return _values_text(map(str, get_args(kind)))
    if get_origin(kind) is dict:
        return "a mapping"
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        if get_origin(item) is Literal:
            return f"a list out of {', '.join(get_args(item))}"
        for mark in getattr(item, "__metadata__", ()):
            if isinstance(mark, OneOf):
                return f"a list out of {', '.join(mark.names())}"
        return "a list of numbers" if item is float else "a list of names"
    return _SCALARS[kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == []:
        return "empty"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _groups() -> dict[str, str]:
    group, found = "", {}
    for line in inspect.getsource(RunConfig).splitlines():
        if ruler := re.fullmatch(r"    # --- (.+) ---", line):
            group = ruler[1]
        elif field := re.match(r"    (\w+): ", line):
            found[field[1]] = group
    return found
