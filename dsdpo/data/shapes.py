"""The shape of a conversation, and what a template leaves out in conversations of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsdpo.data.calls import calls_of, parsed_arguments
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Message

REASONING = ("reasoning_content", "reasoning", "thinking")

Render = Callable[[Sequence[Message], list[dict[str, Any]] | None, bool], str]
Shape = tuple[Any, ...]


def shared_length(one: str, other: str) -> int:
    """Characters that both begin with."""
    size = min(len(one), len(other))
    return next((i for i in range(size) if one[i] != other[i]), size)


def after_shared(prompt: str, replied: str) -> str:
    """What follows the beginning that both share: the completion."""
    return replied[len(prompt) if replied.startswith(prompt) else shared_length(prompt, replied) :]


def _kind(value: Any) -> Any:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list):
        return tuple(_kind(some.get("text")) if isinstance(some, dict) else None for some in value)
    return type(value).__name__


def shape_of(message: Message) -> Shape:
    """Role, keys, and which of them hold something."""
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str):
        return message["role"], not content or content.isspace()
    calls = tuple((_kind(call.get("name")), _kind_of_arguments(call)) for call in calls_of(message))
    rest = tuple((key, _kind(value)) for key, value in sorted(message.items()) if key not in ("role", "tool_calls"))
    return message["role"], calls, rest


def _kind_of_arguments(function: dict[str, Any]) -> str:
    arguments = parsed_arguments(function.get("arguments"))
    return f"{type(arguments).__name__}{bool(arguments)}"


class Conversation:
    """A prompt with what renders it.

    Args:
        prompt: its messages.
        tools: function descriptions, or None.
        variables: further variables of the template.
        render: (messages, tools, for_reply) -> text.
    """

    def __init__(
        self,
        prompt: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        render: Render,
    ) -> None:
        self.prompt, self.tools, self.render = prompt, tools, render
        self.shape: Shape = (bool(tools), repr(variables) if variables else "", *map(shape_of, prompt))


def words_left_out(conversation: Conversation, reply: Message | None) -> frozenset[tuple[Any, ...]] | None:
    """Places whose words a template leaves out; None where it refuses the trial.

    The conversation is rendered with a word of its own in each place, and the words are looked for.

    Args:
        reply: the last message, whose words must stand after the prompt. None: the prompt's words are looked for.
    """
    words, tools, render = _Words(), conversation.tools, conversation.render
    tried = [words.message(message, number) for number, message in enumerate(conversation.prompt)]
    tried_tools = [words.tool(tool, number) for number, tool in enumerate(tools)] if tools else None
    try:
        text = render(tried, tried_tools, True)
        if reply is not None:
            words.used.clear()
            text = after_shared(text, render([*tried, words.message(reply, len(tried))], tried_tools, False))
    except Dropped:
        return None
    return frozenset(place for place, some in words.used.items() if not all(word in text for word in some))


class _Words:
    """Words that stand nowhere else, by place."""

    def __init__(self) -> None:
        self.used: dict[tuple[Any, ...], list[str]] = {}
        self._number = 0

    def word(self, *place: Any) -> str:
        """A new word for a place."""
        self._number += 1
        word = f"zq{self._number}xj"
        self.used.setdefault(place, []).append(word)
        return word

    def message(self, message: Message, number: int) -> Message:
        """The message with words in place of its texts."""
        tried = dict(message)
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            tried["content"] = self.word(number, "content")
        elif isinstance(content, list):
            parts: Iterable[Any] = (some for some in content if isinstance(some, dict) and some.get("text"))
            new = {id(some): {**some, "text": self.word(number, "content", n)} for n, some in enumerate(parts)}
            tried["content"] = [new.get(id(some), some) for some in content]
        thoughts: dict[str, str] = {}
        for key in REASONING:
            value = message.get(key)
            if isinstance(value, str) and value.strip():
                if value not in thoughts:
                    thoughts[value] = self.word(number, "reasoning", value == message.get(REASONING[0]))
                tried[key] = thoughts[value]
        if message.get("tool_calls"):
            tried["tool_calls"] = [self._call(call, number, n) for n, call in enumerate(message["tool_calls"])]
        return tried

    def _call(self, call: Any, number: int, n: int) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"], number, n)}
        tried = dict(call)
        if call.get("name"):
            tried["name"] = self.word(number, "name", n)
        arguments = parsed_arguments(call.get("arguments"))
        if isinstance(arguments, dict) and arguments:
            key, value = self.word(number, "arguments", n), self.word(number, "arguments", n)
            tried["arguments"] = {key: value}
        elif arguments:
            tried["arguments"] = self.word(number, "arguments", n)
        return tried

    def tool(self, tool: dict[str, Any], number: int) -> dict[str, Any]:
        """The tool with a word for its name."""
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self.tool(tool["function"], number)}
        return {**tool, "name": self.word("tool", number)} if tool.get("name") else tool
