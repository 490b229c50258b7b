"""Function calls in messages: their arguments as a template takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dsdpo.data.example import Message


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The functions that a message calls: {"name", "arguments"}."""
    calls = message.get("tool_calls") or []
    functions = (call.get("function", call) if isinstance(call, dict) else {} for call in calls)
    return [function if isinstance(function, dict) else {} for function in functions]


def parsed_arguments(arguments: Any) -> Any:
    """Arguments in JSON text as the object that they are, none (null, or no text) as an empty one; else as given."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return {} if value is None else value if isinstance(value, dict) else arguments


def with_arguments(message: Message, as_text: bool) -> Message:
    """A message whose calls have their arguments as objects, or as JSON text; a call without any has `{}`."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, as_text) for call in message["tool_calls"]]}


def _call_with_arguments(call: Any, as_text: bool) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_arguments(call["function"], as_text)}
    value = call.get("arguments")
    parsed = parsed_arguments(value)
    if not as_text:
        return {**call, "arguments": parsed}
    is_text = isinstance(value, str) and bool(parsed)
    return {**call, "arguments": value if is_text else json.dumps(parsed, ensure_ascii=False)}


def arguments_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Arguments that are objects and not empty."""
    found = (call.get("arguments") for message in messages for call in calls_of(message))
    return [arguments for arguments in found if isinstance(arguments, dict) and arguments]


def without_quotes(messages: Sequence[Message]) -> list[Message]:
    """The messages without single quotes in their texts, so that only the template can print Python; calls stay."""
    return [
        {key: value.replace("'", "") if isinstance(value, str) else value for key, value in message.items()}
        for message in messages
    ]
