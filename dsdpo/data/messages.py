"""The checks that every format shares: text, messages, turns, scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsdpo.data.dropped import Dropped, kind_of
from dsdpo.data.example import Message


class Columns:
    """A row, seen through the entry's `columns` (our name -> name in the row)."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.row = row
        self.columns = columns

    def get(self, key: str, *usual: str) -> Any:
        """The value under the name that `columns` gives for `key`, else under the first usual name with a value.

        Raises:
            Dropped: `columns` names a column that the row lacks.
        """
        named = self.columns.get(key)
        if named is not None:
            if named not in self.row:
                raise Dropped("named_column_missing", f"{named} (columns.{key})")
            return self.row[named]
        return next((self.row[name] for name in usual or (key,) if self.row.get(name) is not None), None)

    def text(self, key: str, *usual: str) -> str:
        """A column that must be there and be text."""
        value = self.get(key, *usual)
        if value is None:
            raise Dropped("column_missing", what=key)
        return text_of(value, key)

    def optional_text(self, key: str, *usual: str) -> str:
        """A text column, "" when it is missing or null."""
        value = self.get(key, *usual)
        return "" if value is None else text_of(value, key)


def text_of(value: Any, what: str) -> str:
    """`value` if it is text. Raises Dropped."""
    if not isinstance(value, str):
        raise Dropped("not_text", kind_of(value), what)
    return value


def read_message(raw: Any, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    """One message with our role names.

    Args:
        raw: the object in the row.
        role_key, content_key: its keys for the two.
        roles: role in the data -> system, user, assistant, tool or function_call.
    """
    if not isinstance(raw, dict):
        raise Dropped("message_not_object", type(raw).__name__)
    role = roles.get(str(raw.get(role_key)))
    if role is None:
        raise Dropped("unknown_role", f"{raw.get(role_key)!r} under {role_key!r}; allowed: {', '.join(roles)}")
    calls = raw.get("tool_calls")
    content = raw.get(content_key)
    text = "" if content is None and calls else text_of(content, "message content")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(text)}
    return {"role": role, "content": text, **({"tool_calls": calls} if calls else {})}


def _tool_calls(text: str) -> list[dict[str, Any]]:
    """LLaMA-Factory's function_call text: a JSON object, or a list of them, with name and arguments."""
    try:
        calls = json.loads(text)
    except ValueError as error:
        raise Dropped("call_not_json", str(error)) from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Dropped("call_without_name")
    return [{"type": "function", "function": call} for call in calls]


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of objects, or the same as JSON text; empty means none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Dropped("tools_not_json", str(error)) from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Dropped("tools_not_list")
    return value


def read_score(value: Any, what: str) -> float | None:
    """A finite number, or None where there is none."""
    if value is None or value == "":
        return None
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise Dropped("bad_score", f"{what}: {value!r}")
    return score


_MAY_FOLLOW = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_prompt(messages: Sequence[Message]) -> list[Message]:
    """The prompt of a conversation, without an empty system message. Raises Dropped if turns are out of order."""
    kept = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    before = None
    for message in kept:
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            raise Dropped("roles_do_not_alternate", f"{role} after {before or 'nothing'}")
        if not message["content"].strip() and "tool_calls" not in message:
            raise Dropped("empty_message", role)
        before = role
    if before is None:
        raise Dropped("empty_prompt")
    if before not in ("user", "tool"):
        raise Dropped("prompt_ends_with_reply", before)
    return kept


def reply(messages: Sequence[Message], side: str) -> list[Message]:
    """A completion: exactly one assistant message."""
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        if len(roles) > 1:
            raise Dropped("several_replies", f"{side}: {', '.join(roles)}")
        raise Dropped("no_reply", ", ".join(roles) or "nothing", side)
    return list(messages)


def assistant(text: str) -> list[Message]:
    """One assistant message in a list."""
    return [{"role": "assistant", "content": text}]


def system_and(system: str, messages: list[Message]) -> list[Message]:
    """`messages` with a system message in front, if there is a text for it and none yet."""
    if not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]
