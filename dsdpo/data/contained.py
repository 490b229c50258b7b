"""Whether a rendered conversation contains what was said in it.

Two checks stand behind each other. A conversation's *shape* (its roles and keys, and which of them are empty) decides
in nearly all templates what is written: it is rendered once with a word of its own in each place, and the words that
are missing are lost for every record of this shape, whatever else may happen to hold the same text. Then each text of
the record itself must be found on its side: templates look into texts, too. White space does not count, since templates
trim it, nor does JSON's way to write a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from dsdpo.data.calls import calls_of, parsed_arguments
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Message
from dsdpo.data.formats.names import is_label, leaves, part_of
from dsdpo.data.shapes import REASONING, Conversation, Shape, after_shared, shape_of, words_left_out

CALLED_TOOLS = "with tools that the chat template writes in calls alone"
EARLIER_THOUGHTS = "with thoughts of earlier turns that the chat template leaves out"
_MAX_SHAPES = 4096
_NOTHING: frozenset[tuple[Any, ...]] = frozenset()
_OWN_KEYS = {"role", "content", "tool_calls", *REASONING}  # others may hold words, too, as their names tell
_LABELS = frozenset(["type", "format", "id", "signature"])
_SURE = 12  # characters without white space that do not stand in a text by chance
_TAG = re.compile(r"<[^<>]{1,30}>|\[[A-Z_]{3,30}\]")


def squeezed(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


class Side:
    """A rendered text in which things are looked up.

    Args:
        text: of the prompt, or of a completion.
        before: what stands before a completion: a tag there may be the first of the reply (`<think>`).
    """

    def __init__(self, text: str, before: str = "") -> None:
        self.text = text
        self._before = before

    @cached_property
    def squeezed(self) -> str:
        return squeezed(self.text)

    def holds(self, text: str) -> bool:
        """Whether `text` stands here, but for white space and JSON's escapes."""
        bare = text.strip()
        if bare in self.text or (short := squeezed(bare)) in self.squeezed:
            return True
        if any(form in self.squeezed for form in _escaped(bare)):
            return True
        tag = _TAG.match(short)
        return tag is not None and squeezed(self._before).endswith(tag[0]) and short[tag.end() :] in self.squeezed

    def holds_value(self, value: Any) -> bool:
        """Whether a value of JSON stands here: as JSON, or each key and each simple value of it."""
        if isinstance(value, str):
            return self.holds(value)
        if any(squeezed(json.dumps(value, ensure_ascii=ascii_only)) in self.squeezed for ascii_only in (False, True)):
            return True
        if isinstance(value, dict):
            return all(self.holds(str(key)) and self.holds_value(some) for key, some in value.items())
        if isinstance(value, list):
            return all(map(self.holds_value, value))
        return str(value) in self.squeezed


def _escaped(text: str) -> Iterator[str]:
    """A text as JSON writes it in a string, without white space."""
    for ascii_only in (False, True):
        written = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        for form in (written, written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")):
            yield squeezed(form.replace("'", "\\u0027") if form != written else form)


class Said(NamedTuple):
    """Something that a record says.

    Attributes:
        place: which one; the same in all records of a shape.
        what: it, in words.
        value: text, or a value of JSON.
    """

    place: tuple[Any, ...]
    what: str
    value: Any


def said_by(message: Message, number: int, what: str, thoughts: bool) -> Iterator[Said]:
    """What must be found of one message.

    Args:
        number: of the message in the conversation.
        what: the message, in words.
        thoughts: whether its reasoning counts.
    """
    content = message.get("content")
    if isinstance(content, str):
        if content.strip():
            yield Said((number, "content"), f"the content of {what}", content)
    elif isinstance(content, list):
        for part, text in enumerate(some["text"] for some in content if isinstance(some, dict) and some.get("text")):
            yield Said((number, "content", part), f"the content of {what}", text)
    if len(message) == 2:
        return
    if thoughts:
        for value in dict.fromkeys(message[key] for key in REASONING if isinstance(message.get(key), str)):
            if value.strip():
                yield Said((number, "reasoning", value == message.get(REASONING[0])), f"the reasoning of {what}", value)
    for key in message.keys() - _OWN_KEYS:
        held = None if is_label(key, message[key]) else part_of(key)
        if held and (thoughts or held != "reply"):
            for text in leaves(message[key], _LABELS):
                if text.strip() and (isinstance(message[key], str) or len(text.split()) > 1):
                    yield Said((number, "key", key), f"{key} of {what}", text)
    for call, function in enumerate(calls_of(message)):
        if name := function.get("name"):
            yield Said((number, "name", call), f"a function call of {what}", str(name))
        if arguments := parsed_arguments(function.get("arguments")):
            yield Said((number, "arguments", call), f"the arguments of a function call of {what}", arguments)


def _tool_names(tools: list[dict[str, Any]] | None) -> Iterator[Said]:
    for number, tool in enumerate(tools or []):
        function = tool.get("function", tool)
        if isinstance(function, dict) and function.get("name"):
            yield Said(("tool", number), "the tools", str(function["name"]))


class Containment:
    """Checks what a template writes, and remembers what it leaves out in each shape of conversation."""

    def __init__(self) -> None:
        self._lost: dict[Shape, frozenset[tuple[Any, ...]] | None] = {}

    def check_prompt(self, conversation: Conversation, text: str) -> tuple[str, ...]:
        """Notes on what the template rightly leaves out of a prompt.

        Args:
            conversation: the prompt.
            text: as the template writes it.

        Raises:
            Dropped: it leaves out something that the record says.
        """
        prompt, tools = conversation.prompt, conversation.tools
        lost = self._lost_in(conversation, None)
        if lost == _NOTHING and not tools and all(_stands_bare(message, text) for message in prompt):
            return ()
        side, notes = Side(text), []
        said = [*_tool_names(tools), *_said_in(prompt)]
        for some in said:
            if _is_found(some, side, said, lost):
                continue
            is_lost = lost is not None and some.place in lost
            if not is_lost and _thoughts_alone(some, prompt, side):
                notes.append(EARLIER_THOUGHTS)
            elif _is_called(some, prompt) and side.holds_value(some.value):
                notes.append(CALLED_TOOLS)
            else:
                raise Dropped("template_leaves_out", _excerpt(some.value), some.what)
        if _misses_earlier_thoughts(prompt, side):
            notes.append(EARLIER_THOUGHTS)
        return tuple(dict.fromkeys(notes))

    def check_reply(self, conversation: Conversation, reply: Message, text: str, whole: str) -> None:
        """Raises Dropped where the template leaves out something of a reply.

        Args:
            conversation: the prompt.
            reply: the message after it.
            text: the prompt as the template writes it.
            whole: the conversation with the reply as it writes it.
        """
        completion = after_shared(text, whole)
        lost = self._lost_in(conversation, reply)
        if lost == _NOTHING and _stands_bare(reply, completion):
            return
        side = Side(completion, whole[: len(whole) - len(completion)])
        said = list(said_by(reply, len(conversation.prompt), "a reply", thoughts=True))
        for some in said:
            if not _is_found(some, side, said, lost):
                raise Dropped("template_leaves_out", _excerpt(some.value), some.what)

    def _lost_in(self, conversation: Conversation, reply: Message | None) -> frozenset[tuple[Any, ...]] | None:
        """Places that the template leaves out in conversations of this shape; None where a trial was refused."""
        shape = (conversation.shape, reply and shape_of(reply))
        if shape not in self._lost:
            if len(self._lost) >= _MAX_SHAPES:
                self._lost.clear()
            self._lost[shape] = words_left_out(conversation, reply)
        return self._lost[shape]


def _stands_bare(message: Message, text: str) -> bool:
    """Whether a message of role and content alone stands in a text as it is; False where more must be looked at."""
    return len(message) == 2 and isinstance(message["content"], str) and message["content"].strip() in text


def _is_found(some: Said, side: Side, said: Sequence[Said], lost: frozenset[tuple[Any, ...]] | None) -> bool:
    """Whether it stands on its side, and not by chance."""
    if not side.holds_value(some.value):
        return False
    if lost is not None and some.place not in lost:
        return True
    if not isinstance(some.value, str):
        return lost is None
    short = squeezed(some.value)
    if lost is not None and len(short) < _SURE:
        return False
    return side.squeezed.count(short) >= sum(short in squeezed(str(other.value)) for other in said)


def _said_in(prompt: Sequence[Message]) -> Iterator[Said]:
    for number, message in enumerate(prompt):
        article = "an" if message["role"] == "assistant" else "a"
        yield from said_by(message, number, f"{article} {message['role']} message of the prompt", thoughts=False)


def _is_called(some: Said, prompt: Sequence[Message]) -> bool:
    """Whether this is a tool that an earlier message calls."""
    names = (function.get("name") for message in prompt if len(message) > 2 for function in calls_of(message))
    return some.place[0] == "tool" and some.value in names


def _thoughts_alone(some: Said, prompt: Sequence[Message], side: Side) -> bool:
    """Whether an earlier reply lost nothing but what stands before its last </think>."""
    if some.place[-1] != "content" or prompt[some.place[0]]["role"] != "assistant" or "</think>" not in some.value:
        return False
    return side.holds(some.value.rsplit("</think>", 1)[1])


def _misses_earlier_thoughts(prompt: Sequence[Message], side: Side) -> bool:
    thoughts = (message[key] for message in prompt if len(message) > 2 for key in REASONING if message.get(key))
    return any(isinstance(some, str) and not side.holds(some) for some in thoughts)


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...")
