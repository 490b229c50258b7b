"""The checks that every format shares: text, messages, turns, scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsdpo.data.dropped import Dropped, kind_of
from dsdpo.data.example import Message
from dsdpo.data.formats.names import is_empty
from dsdpo.data.formats.parts import MEDIA, read_parts, thoughts_of
from dsdpo.data.formats.written import read_list, read_written, written_parts
from dsdpo.data.shapes import REASONING
from dsdpo.data.turns import says_trained


def text_of(value: Any, what: str) -> str:
    """`value` if it is text. Raises Dropped."""
    if not isinstance(value, str):
        raise Dropped("not_text", kind_of(value), what)
    return value


_MAY_OPEN = frozenset("[ \t\r\n")


def read_message(raw: Any, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    """One message with our names for role and content, and every other key as it was; keys with null are left out.

    Args:
        raw: the object in the record.
        role_key, content_key: its keys for the two.
        roles: role in the data -> system, user, assistant, tool or function_call.
    """
    if not isinstance(raw, dict):
        raw = read_written(raw, "a message")
        if not isinstance(raw, dict):
            raise Dropped("message_not_object", kind_of(raw))
    role = roles.get(str(raw.get(role_key))) or roles.get(str(raw.get(role_key)).strip().lower())
    if role is None:
        raise Dropped("unknown_role", f"{raw.get(role_key)!r} under {role_key!r}; allowed: {', '.join(roles)}")
    content, thoughts, calls = raw.get(content_key), "", tuple[str, ...]()
    if not isinstance(content, str) or (content[:1] in _MAY_OPEN and content.lstrip().startswith("[")):
        if content is None and isinstance(raw.get("parts"), list):  # Gemini's
            content = raw["parts"]
            raw = {key: value for key, value in raw.items() if key != "parts"}
        content, thoughts, calls = _content(content)
    message: Message = {"role": role, "content": content}
    if len(raw) > 2 or content_key not in raw:
        _add_keys(message, raw, role_key, content_key, roles)
    if thoughts:
        _add_thoughts(message, thoughts)
    if calls:
        if "tool_calls" in message:
            raise Dropped("message_says_two", "tool_calls and parts of its content", "calls")
        message["tool_calls"] = [call for text in calls for call in _called(text)]
    if content is None:
        if "tool_calls" in message:
            return message
        if has_thoughts(message):
            message["content"] = content = ""
    text = text_of(content, "message content")
    if role == "function_call":
        message |= {"role": "assistant", "content": "", "tool_calls": _called(text)}
    return message


def _content(content: Any) -> tuple[Any, str, tuple[str, ...]]:
    """(content, thoughts, calls) of a content that may be parts, or JSON text of them; anything else stays."""
    parts = written_parts(content, "message content") if isinstance(content, str) else content
    if isinstance(parts, dict) and isinstance(parts.get("type"), str):
        parts = [parts]
    return read_parts(parts) if isinstance(parts, list) else (content, "", ())


def _add_thoughts(message: Message, thoughts: str) -> None:
    """Add the thoughts of a message's content as its reasoning, unless it has the same."""
    own = [message[key] for key in REASONING if not is_empty(message.get(key))]
    if thoughts in own:
        return
    if own:
        raise Dropped("message_says_two", f"{own[0]!r} and {thoughts!r}", "reasoning")
    message[REASONING[0]] = thoughts


def has_thoughts(message: Message) -> bool:
    """Whether a message has a reasoning that says something."""
    return len(message) > 2 and any(isinstance(text := message.get(key), str) and text.strip() for key in REASONING)


def _add_keys(
    message: Message, raw: Mapping[str, Any], role_key: str, content_key: str, roles: Mapping[str, str]
) -> None:
    """Add the keys of a raw message besides its role and content."""
    for key, value in raw.items():
        if key in (role_key, content_key) or value is None:
            continue
        if key == "tool_calls":
            if calls := read_calls(value):
                message[key] = calls
        elif key == "function_call":  # OpenAI's form before there were tool_calls
            if calls := read_calls(value):
                if not is_empty(raw.get("tool_calls")):
                    raise Dropped("message_says_two", f"{key} and tool_calls", "calls")
                message["tool_calls"] = calls
        elif key in message:
            ours = message[key]
            if value not in ("", ours) and not (key == "role" and roles.get(str(value)) == ours):
                raise Dropped("message_says_two", f"{value!r} and {ours!r}", key)
        elif key in MEDIA and value not in ("", [], {}):
            raise Dropped("message_with_media", key, key)
        elif key in REASONING and isinstance(value, (list, dict)):
            if not is_empty(value):
                message[key] = thoughts_of(value, key)
        else:
            message[key] = value


def read_calls(value: Any) -> list[dict[str, Any]]:
    """The `tool_calls` of a message, each with its OpenAI wrapper; their arguments stay as they are.

    Args:
        value: a list of calls or one call, or the same as JSON text.
    """
    if is_empty(value):
        return []
    value = read_list(value, "tool_calls")
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Dropped("calls_not_list")
    wrapped = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    if not all(isinstance(call["function"], dict) and call["function"].get("name") for call in wrapped):
        raise Dropped("call_without_name")
    return wrapped


def _called(text: str) -> list[dict[str, Any]]:
    """LLaMA-Factory's function_call text: a JSON object, or a list of them, with name and arguments."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Dropped("call_not_json", str(error)) from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Dropped("call_without_name")
    return read_calls(calls)


TOOL_KEYS = ("tools", "functions")


def _check_no_tools(message: Message) -> None:
    if found := [key for key in TOOL_KEYS if not is_empty(message.get(key))]:
        raise Dropped("tools_in_message", f"{found[0]}, in a message of the role {message['role']}")


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The `tools` column with OpenAI's wrapper around each tool; empty means none.

    Args:
        value: a list of objects, or the same as JSON text, or a list of JSON texts. LLaMA-Factory's tools are bare
            functions, with a name but no `function`.
    """
    if is_empty(value):
        return None
    value = read_list(value, "tools")
    if isinstance(value, str):
        raise Dropped("tools_not_json", value.strip()[:60])
    tools = [read_list(tool, "tools") for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Dropped("tools_not_list")
    if not all(tool.get("name") or isinstance(tool.get("function"), dict) for tool in tools):
        raise Dropped("tool_without_name", next(", ".join(tool) for tool in tools if not tool.get("name")))
    return [_wrapped(tool) for tool in tools]


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}


_RESERVED = ("messages", "tools", "add_generation_prompt", "tokenize", "conversation")


def read_template_kwargs(value: Any) -> dict[str, Any]:
    """The `chat_template_kwargs` column: an object or its JSON text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    value = read_list(value, "chat_template_kwargs")
    if not isinstance(value, dict):
        raise Dropped("bad_template_kwargs", str(value)[:60])
    if taken := [key for key in value if key in _RESERVED]:
        raise Dropped("bad_template_kwargs", f"{', '.join(taken)} is given by the record's own columns")
    return value


def read_score(value: Any, what: str) -> float | None:
    """A finite number, or None where there is none."""
    if value is None or value == "":
        return None
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise Dropped("bad_score", f"{what}: {value!r}")
    return score


def read_weight(value: Any) -> float:
    """A number above 0; 1 where there is none."""
    if is_empty(value):
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise Dropped("bad_weight", repr(value)[:60])
    return weight


_MAY_FOLLOW = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_prompt(messages: Sequence[Message]) -> list[Message]:
    """The prompt of a conversation, without an empty system message. Raises Dropped if turns are out of order."""
    kept = in_order(messages)
    if not kept:
        raise Dropped("empty_prompt")
    if kept[-1]["role"] not in ("user", "tool"):
        raise Dropped("prompt_ends_with_reply", kept[-1]["role"])
    return kept


def says_nothing(message: Message) -> bool:
    """Whether a message has no text, no calls and no reasoning."""
    return not (message["content"] or "").strip() and "tool_calls" not in message and not has_thoughts(message)


def in_order(messages: Sequence[Message]) -> list[Message]:
    """Messages without an empty system message. Raises Dropped if turns are out of order, or one says nothing."""
    kept = [m for m in messages if m["role"] != "system" or (m["content"] or "").strip()]
    before = None
    for message in kept:
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            raise Dropped("roles_do_not_alternate", f"{role} after {before or 'nothing'}")
        if says_nothing(message):
            raise Dropped("empty_message", role)
        if len(message) > 2:
            _check_no_tools(message)
        before = role
    return kept


def check_reply_keys(message: Message) -> tuple[str, ...]:
    """Notes on a reply's keys that weight its loss, which are not used.

    Raises:
        Dropped: such a key says that the reply is not to be trained, or the reply holds tools.
    """
    _check_no_tools(message)
    notes = []
    for key, value in message.items():
        trained = says_trained(key, value)
        if trained is False:
            raise Dropped("reply_not_trained", f"{key}: {value!r}")
        if trained == "?":
            notes.append(f"with the key {key} of a reply not used")
    return tuple(notes)


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


def user(text: str) -> list[Message]:
    """One user message in a list."""
    return [{"role": "user", "content": text}]


def system_and(system: str, messages: list[Message], code: str = "two_systems") -> list[Message]:
    """`messages` with this system text, unless their own system message says the same.

    Raises:
        Dropped: it says something else; with this code.
    """
    if not system.strip():
        return messages
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    own = messages[0]["content"] or ""
    if not own.strip():
        return [{**messages[0], "content": system}, *messages[1:]]
    if own.split() != system.split():
        raise Dropped(code, f"{system.strip()[:60]!r} and {own.strip()[:60]!r}")
    return messages
