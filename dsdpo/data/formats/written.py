"""Lists and objects that a column holds as text: JSON is read, also of JSON; Python's and damaged one is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.names import is_empty, part_of
from dsdpo.data.formats.parts import are_parts, read_parts
from dsdpo.data.json_decoder import COLUMN_DECODER, without_bom

_OPENS = re.compile(
    r"\s*(?:\"(?:\s|\ufeff|\\ufeff)*[\[{]|\[\s*[\[{\"]|\{\s*\"|(?:array\(\s*)?[\[{]\s*(?:array\(\s*)?[\[{]*\s*')"
)
_PYTHON = re.compile(r"\s*(?:array\(\s*)?[\[{(]\s*(?:array\(\s*)?[\[{(]*\s*'")
_PYTHON_ROLE = re.compile(r"'(?:role|from)'\s*:\s*['\"]")
_AROUND = r"(?:\{\s*\"(?:messages|conversations)\"\s*:\s*)?"
_JSON = re.compile(rf"\s*{_AROUND}(?:\[\s*)?\{{\s*\"(?:role|from|content|value)\"\s*:")
_JSON_ROLE = re.compile(r"\"(?:role|from)\"\s*:\s*\"")
_JSON_TEXT = re.compile(r"\"(?:content|value|tool_calls|chosen_value)\"\s*:")
_PYTHON_TEXT = re.compile(r"'(?:content|value|tool_calls|chosen_value)'\s*:")
_PART = re.compile(r"\s*\[\s*\{\s*(['\"])type\1\s*:\s*(['\"])(?:(?:input_|output_)?text|thinking)\2\s*,")
# Objects around messages: {"messages": [...]}, and a choice of OpenAI's answers.
_WRAPPERS = ("messages", "conversations", "conversation", "message")


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

    Messages are taken out of an object around them, and parts of a content become their text.

    Raises:
        Dropped: the text is Python's repr of messages, or JSON of messages that is damaged or names a key twice.
    """
    if not isinstance(value, str):
        if isinstance(value, dict) and isinstance(value.get("role") or value.get("from"), str):
            return value
        return _unwrapped(value, what)
    bare = without_bom(value)
    if not _OPENS.match(bare):
        return value
    parsed = _json_if(bare, lambda found: is_messages(found) or _unwrapped(found, what) is not found)
    if isinstance(parsed, str):  # JSON of JSON
        inner = read_written(parsed, what)
        return value if inner is parsed else inner
    if parsed is not None:
        inner = _unwrapped(parsed, what)
        return inner if inner is not parsed or is_messages(parsed) else value
    _refuse_damaged(bare, what)
    _check_part(bare, what)
    return value


def _refuse_damaged(value: str, what: str) -> None:
    """Raise Dropped for Python's repr of messages, and JSON of messages that has a fault."""
    if (
        _PYTHON.match(value)
        and value.rstrip()[-1] in "])}"
        and _PYTHON_ROLE.search(value)
        and _PYTHON_TEXT.search(value)
    ):
        raise Dropped("python_repr", _excerpt(value), what)
    is_json = _JSON.match(value) and _JSON_ROLE.search(value) and _JSON_TEXT.search(value)
    if is_json and (wrong := _damage(value)):
        raise Dropped("messages_not_json", f"{wrong}: {_excerpt(value)}", what)


def _unwrapped(value: Any, what: str) -> Any:
    """Messages out of the object around them, the text of parts; anything else as it is."""
    if isinstance(value, dict):
        if "role" in value or "from" in value:
            return _transposed(value)
        for key in _WRAPPERS:
            if key in value and is_messages(inner := read_written(value[key], what)):
                others = [str(k) for k, some in value.items() if k != key and not is_empty(some) and part_of(str(k))]
                if others:
                    raise Dropped("wrapper_with_keys", ", ".join(others), what)
                return inner
    elif isinstance(value, list) and value and isinstance(value[0], str) and value[0].lstrip().startswith("{"):
        inner = [_json_if(text, is_messages) if isinstance(text, str) else text for text in value]
        return inner if is_messages(inner) else value
    elif isinstance(value, list) and value and isinstance(value[0], dict) and "type" in value[0] and are_parts(value):
        parts = read_parts(value)
        if parts.thoughts or parts.calls:
            raise Dropped("part_not_read", "outside a message", "thinking" if parts.thoughts else "tool_call")
        return parts.text
    return value


def _transposed(value: dict[str, Any]) -> Any:
    """An object of lists as `datasets` writes lists of objects ({"role": [...], "content": [...]}) -> the objects."""
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    turns = [dict(zip(value, row)) for row in zip(*columns)]
    return turns if is_messages(turns) else value


def written_parts(text: str, what: str) -> Any:
    """The list of parts that a message's content holds as JSON text; other text as it is.

    Raises:
        Dropped: the text is Python's repr of parts, or JSON of them that is damaged.
    """
    parsed = _json_if(text, are_parts)
    if parsed is None:
        _check_part(text, what)
    return parsed if are_parts(parsed) else text


def _check_part(text: str, what: str) -> None:
    """Raises Dropped where a text is parts as Python prints them, or damaged JSON of them."""
    begins = _PART.match(text)
    if begins is None:
        return
    if begins[1] == "'" and text.rstrip()[-1] == "]":
        raise Dropped("python_repr", _excerpt(text), what)
    if begins[1] == '"' and (wrong := _damage(text)):
        raise Dropped("messages_not_json", f"{wrong}: {_excerpt(text)}", what)


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
        Dropped: the text is Python's repr of a list or object, or JSON that names a key twice.
    """
    if not isinstance(value, str):
        return value
    parsed = _json_or_none(without_bom(value))
    if isinstance(parsed, str):  # JSON of JSON
        parsed = _json_or_none(without_bom(parsed))
    if isinstance(parsed, (list, dict)):
        return parsed
    if parsed is None and _PYTHON.match(value):
        raise Dropped("python_repr", _excerpt(value), what)
    return value


def read_conversation(value: Any) -> Any:
    """The column of a conversation: a list, JSON text of one, or an object around one."""
    if not isinstance(value, list):
        value = read_list(value, "messages")
    if not isinstance(value, list):
        value = read_written(value, "messages")
        return [value] if isinstance(value, dict) and is_messages(value) else value
    if value and isinstance(value[0], str):
        return [read_written(raw, "a message") for raw in value]
    return value


def _json_if(text: str, is_wanted: Callable[[Any], bool]) -> Any:
    """What a text says as JSON, or None; raises Dropped for a key that stands twice in what is wanted."""
    try:
        return _json_or_none(text)
    except Dropped:
        if is_wanted(json.loads(text, strict=False)):
            raise
        return None


def _json_or_none(text: str) -> Any:
    """What a text says as JSON. Raises Dropped for a key that stands twice."""
    try:
        return COLUMN_DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _excerpt(text: str) -> str:
    return text.strip()[:60]
