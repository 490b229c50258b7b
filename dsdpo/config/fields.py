"""What an option's field says beyond its type: names that it takes, a check with words, a policy for resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import GetCoreSchemaHandler
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class OneOf:
    """In `Annotated[str, OneOf(names)]`: the text is one of `names()`, looked up at each validation and message."""

    names: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.names():
            raise ValueError(f"must be one of {', '.join(self.names())}")
        return value


@dataclass(frozen=True)
class Checked:
    """In `Annotated[str, Checked(check, words)]`: `check` raises ValueError where a value is wrong, `words` say what is
    allowed, and `hint` what a wrong text was probably meant to be."""

    check: Callable[[Any], Any]
    words: str
    hint: Callable[[str], str] = lambda text: ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


# What pydantic and transformers' parser read as a switch.
SWITCH_WORDS = dict.fromkeys(("true", "yes", "on", "y", "t", "1"), "true") | dict.fromkeys(
    ("false", "no", "off", "n", "f", "0"), "false"
)


@dataclass(frozen=True)
class Switch:
    """In `Annotated[Literal[...], Switch(on, off)]`: `true` and `false`, as other trainers write it, and earlier run
    configs, are two of the words."""

    on: str
    off: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.word, handler(source))

    def word(self, value: Any) -> Any:
        """The word that a value means; a value that is no switch as it is."""
        found = SWITCH_WORDS.get(str(value).strip().lower()) if isinstance(value, (bool, int, str)) else None
        return {"true": self.on, "false": self.off}.get(found or "", value)


ResumePolicy = Literal["fixed", "free", "consent"]
FREE: JsonDict = {"resume": "free"}
CONSENT: JsonDict = {"resume": "consent"}


def resume_policy(field: FieldInfo) -> ResumePolicy:
    """Whether a checkpoint may be continued with another value of an option than it was saved with.

    `fixed`, where the field does not say: no. `free`: yes, since the option changes nothing that is learnt beyond
    rounding: paths (their content is compared instead), speed, reports. `consent`: if `change_on_resume` names it.
    """
    extra = field.json_schema_extra
    return cast(ResumePolicy, extra["resume"]) if isinstance(extra, dict) else "fixed"
