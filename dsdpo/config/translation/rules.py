"""What an option of another trainer means here: it sets options of ours, has no effect, or is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsdpo.config.fields import SWITCH_WORDS


@dataclass(frozen=True)
class Sets:
    """It is set by options of ours: name -> value."""

    options: Mapping[str, Any]


@dataclass(frozen=True)
class NoEffect:
    """What it asks for is done anyway, or is no business of the training; `why` says which."""

    why: str


@dataclass(frozen=True)
class Refused:
    """What it asks for is not done here; `remedy` says what to do instead."""

    remedy: str


Meaning: TypeAlias = Sets | NoEffect | Refused
Given: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Any, Given], Meaning]
"""(value, all options of the run as they were given) -> what the option means."""

NOT_SET = "it is not set"
_OFF = ("", "none", "null", "false", "0.0", "{}", "[]")


def word(value: Any) -> str:
    """A value as a word to compare: `True`, `yes`, `y` and `t` give `true`."""
    text = "none" if value is None else str(value).strip().lower()
    return SWITCH_WORDS.get(text, text)


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing."""
    return word(value) in _OFF if not isinstance(value, (list, dict)) else not value


def number(value: Any) -> float | None:
    """A value as a number; None where it is none, infinite or nan."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def option(name: str, **words: Any) -> Rule:
    """The same option under our name; `words` are values that have another name, too."""

    def rule(value: Any, given: Given) -> Meaning:
        if value is None or value == "":
            return NoEffect(NOT_SET)
        known = words.get(word(value), words.get(str(value), value)) if not isinstance(value, (list, dict)) else value
        return Sets({name: known})

    return rule


def flag(name: str, on: Any, off: Any = None) -> Rule:
    """A switch that sets an option to `on`; to `off`, where that is given, when it is off."""

    def rule(value: Any, given: Given) -> Meaning:
        if not is_off(value):
            return Sets({name: on}) if word(value) == "true" else Refused("write true or false")
        return NoEffect(NOT_SET) if off is None or value is None else Sets({name: off})

    return rule


def no_effect(why: str) -> Rule:
    """Whatever its value is."""
    return lambda value, given: NoEffect(why)


def refused(remedy: str) -> Rule:
    """Unless it is switched off."""
    return lambda value, given: NoEffect(NOT_SET) if is_off(value) else Refused(remedy)


def only(*words: str, why: str, remedy: str) -> Rule:
    """Refused unless its value is one of `words`, which asks for what is done anyway, or empty."""

    def rule(value: Any, given: Given) -> Meaning:
        if value is None or word(value) in words:
            return NoEffect(why)
        return Refused(remedy)

    return rule


def each(rule: Rule, names: str) -> dict[str, Rule]:
    """One rule for several names, in a text with spaces between."""
    return dict.fromkeys(names.split(), rule)


def lossless_list(value: Any) -> list[str]:
    """A list of names that may be written with commas or spaces between."""
    items = value if isinstance(value, list) else str(value).replace(",", " ").split()
    return [str(item) for item in items]
