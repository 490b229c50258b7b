"""Lists and objects that a column holds as text: JSON is read, also of JSON; Python's and damaged one is refused."""

from __future__ import annotations

import json
import re
from typing import Any

from dsdpo.data.dropped import Dropped

_OPENS = re.compile(r"\s*(?:\"\s*[\[{]|\[\s*[\[{\"]|\{\s*\"|(?:array\(\s*)?[\[{]\s*(?:array\(\s*)?[\[{]*\s*')")
_PYTHON = re.compile(r"\s*(?:array\(\s*)?[\[{(]\s*(?:array\(\s*)?[\[{(]*\s*'")
_PYTHON_ROLE = re.compile(r"'(?:role|from)'\s*:\s*['\"]")
_JSON = re.compile(r"\s*(?:\[\s*)?\{\s*\"(?:role|from|content|value)\"\s*:")
_JSON_ROLE = re.compile(r"\"(?:role|from)\"\s*:\s*\"")
_JSON_TEXT = re.compile(r"\"(?:content|value|tool_calls|chosen_value)\"\s*:")
_PYTHON_TEXT = re.compile(r"'(?:content|value|tool_calls|chosen_value)'\s*:")


def is_messages(value: Any) -> bool:
    """Whether a value is a list of objects with a role and what was said, or one such object."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, dict) and is_messages(item) for item in value)
    if not isinstance(value, dict):
        return False
    if "role" in value:
        return any(key in value for key in ("content", "value", "tool_calls", "chosen_value"))
    if "from" in value:  # {"from": "USD", "value": 3} is something else
        said = [value[key] for key in ("value", "content", "tool_calls", "chosen_value") if key in value]
        return bool(said) and not isinstance(said[0], (bool, int, float))
    return False


def read_written(value: Any, what: str) -> Any:
    """A column that may be text or messages: messages in JSON text are parsed, other text stays as it is.

    Raises:
        Dropped: the text is Python's repr of messages, or JSON of messages that is damaged.
    """
    if not isinstance(value, str) or not _OPENS.match(value):
        return value
    parsed = _json_or_none(value)
    if isinstance(parsed, str):  # JSON of JSON
        inner = read_written(parsed, what)
        return value if isinstance(inner, str) else inner
    if parsed is not None:
        return parsed if is_messages(parsed) else value
    if (
        _PYTHON.match(value)
        and value.rstrip()[-1] in "])}"
        and _PYTHON_ROLE.search(value)
        and _PYTHON_TEXT.search(value)
    ):
        raise Dropped("python_repr", _excerpt(value), what)
    if _JSON.match(value) and _JSON_ROLE.search(value) and _JSON_TEXT.search(value) and (wrong := _damage(value)):
        raise Dropped("messages_not_json", f"{wrong}: {_excerpt(value)}", what)
    return value


def _damage(text: str) -> str:
    """What is wrong with a text that is JSON but for a fault in it or its end; empty for a text that goes on."""
    bare = text.strip()
    try:
        json.loads(bare, strict=False)
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated") or error.pos >= len(bare)
        return str(error) if is_cut or bare[-1] in "]}" else ""
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


def read_list(value: Any, what: str) -> Any:
    """A column that must be a list or an object: JSON text of one is parsed; other text stays as it is.

    Raises:
        Dropped: the text is Python's repr of a list or object.
    """
    if not isinstance(value, str):
        return value
    parsed = _json_or_none(value)
    if isinstance(parsed, str):  # JSON of JSON
        parsed = _json_or_none(parsed)
    if isinstance(parsed, (list, dict)):
        return parsed
    if parsed is None and _PYTHON.match(value):
        raise Dropped("python_repr", _excerpt(value), what)
    return value


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text, strict=False)  # line ends inside texts, as they stand
    except (ValueError, RecursionError):
        return None


def _excerpt(text: str) -> str:
    return text.strip()[:60]
