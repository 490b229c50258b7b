"""A run's chat template: how it is rendered, and what begins and ends a turn in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from dsdpo.compat import chat_renderer
from dsdpo.data.calls import arguments_of, with_arguments, without_quotes
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Message
from dsdpo.data.template_date import DATE_STRING, STRFTIME_NOW
from dsdpo.data.template_files import Text
from dsdpo.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "words of the reply"
_QUESTION = {"role": "user", "content": "question"}
_TURNS: list[Message] = [_QUESTION, {"role": "assistant", "content": _SENTINEL}]
_TOOL: dict[str, Any] = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
_TOOL["parameters"] |= {"properties": {"key": {"type": "string", "description": "A key."}}, "required": ["key"]}
_TOOL = {"type": "function", "function": _TOOL}
# What a record's chat_template_kwargs may not set: the record's own parts, and what apply_chat_template does itself.
_NOT_FOR_RECORDS = frozenset(
    ("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message")
    + ("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs")
    + ("return_assistant_tokens_mask", "strftime_now")
)
_MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{3,30}\]")
_NO_TURN = re.compile("think|tool|reason|func|call|code|image|audio|video", re.IGNORECASE)
# A text that begins with one of these was rendered, by whatever template.
_KNOWN_START = re.compile(
    r"\s*(<s>|<bos>|<\|begin_of_text\|>|<\uff5cbegin▁of▁sentence\uff5c>|\[gMASK\]<sop>)?\s*"
    r"(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|\[INST\]|<\|(user|system)\|>\n|<\uff5cUser\uff5c>"
    r"|<\|START_OF_TURN_TOKEN\|>|<\|start_of_role\|>|<\|start\|>(system|user|developer))"
)


class TurnEnd(NamedTuple):
    """How the replies of a kind end.

    Attributes:
        token: ends a reply; None where the template writes none.
        tail: what the template writes after it.
    """

    token: str | None
    tail: str


class ChatTemplate:
    """A template that renders conversations for a tokenizer.

    Args:
        tokenizer: of the model to train.
        text: of the template, or of several by name; None: the tokenizer's own.
        name: for messages.
        date: YYYY-MM-DD that counts as today, or None: today.

    Attributes:
        end: how a reply ends that calls nothing, in a conversation without tools.
        openers: markers that open a turn.

    Raises:
        ConfigError: it cannot render a small conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: Text | None, name: str, date: str | None) -> None:
        self._special = special_tokens(tokenizer)
        self._renderer = chat_renderer(tokenizer, text)
        self._name = name
        self._source = str(text or tokenizer.chat_template)
        self._more = _date_variables(date, self._source)
        self.end = self._learn_end()
        self._ends: dict[tuple[bool, bool], TurnEnd] = {(False, False): self.end}
        self.openers = self._learn_openers(tokenizer)

    # --- rendering ---

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        for_reply: bool,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """What `apply_chat_template(messages, tools, add_generation_prompt=for_reply, **variables)` gives.

        Arguments of function calls are objects. A template that cannot take them gets JSON text, and one that cannot
        take the null content of a message with calls gets "".

        Raises:
            Dropped: the template raises an exception, whichever.
        """
        if variables and (taken := sorted(_NOT_FOR_RECORDS & variables.keys())):
            raise Dropped("template_error", f"chat_template_kwargs holds {', '.join(taken)}, which it cannot set")
        more = {**self._more, **variables} if variables else self._more
        if not any(message.get("tool_calls") for message in messages):
            return self._once(messages, tools, for_reply, more)
        refusal: Dropped | None = None
        for as_text in (False, True):
            try:
                return self._with_calls(messages, tools, for_reply, more, as_text)
            except Dropped as dropped:
                refusal = refusal or dropped
        assert refusal is not None
        raise refusal

    def _with_calls(self, messages: Sequence[Message], tools: Any, for_reply: bool, more: Any, as_text: bool) -> str:
        shown = [with_arguments(message, as_text) for message in messages]
        emptied = [{**m, "content": ""} if m.get("content", "") is None else m for m in shown]
        if emptied == shown:
            text = self._once(shown, tools, for_reply, more)
        else:
            try:
                text = self._once(shown, tools, for_reply, more)
            except Dropped:
                text = self._once(emptied, tools, for_reply, more)
            else:
                other = self._once_or_none(emptied, tools, for_reply, more)
                if other is not None and text.count("None") > other.count("None"):
                    text = other  # the template writes the null out
        printed = [] if as_text else [str(arguments) for arguments in arguments_of(shown)]
        if any(written in text for written in printed):
            bare = self._once_or_none(without_quotes(shown), tools, for_reply, more)
            if bare is None or any(written in bare for written in printed):
                raise Dropped("template_error", "it writes a call's arguments as a Python dict, not as JSON")
        return text

    def _once_or_none(self, messages: Sequence[Message], tools: Any, for_reply: bool, more: Any) -> str | None:
        try:
            return self._once(messages, tools, for_reply, more)
        except Dropped:
            return None

    def _once(self, messages: Sequence[Message], tools: Any, for_reply: bool, more: Any) -> str:
        try:
            return self._renderer(list(messages), tools or None, for_reply, **more)
        except TemplateError as error:
            raise Dropped("template_error", str(error)) from error
        except Exception as error:  # a template is a program of somebody else's: any exception can come out
            raise Dropped("template_error", f"{type(error).__name__}: {error}") from error

    def names(self, variable: str) -> bool:
        """Whether the template's text names a variable: else it does not matter what the variable is."""
        return re.search(rf"(?<!\w){re.escape(variable)}(?!\w)", self._source) is not None

    # --- what it writes around a turn ---

    def end_of(self, reply: Message, tools: Sequence[Any] | None) -> TurnEnd:
        """How a reply ends: calls may end with another token than texts, and tools may have their own template."""
        has_tools, calls = kind = bool(tools), bool(reply.get("tool_calls"))
        if kind not in self._ends:
            self._ends[kind] = self._learn_end_of_calls(has_tools) if calls else self._learn_end_beside_tools()
        return self._ends[kind]

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """The tokens that end replies of all kinds, the one that ends a text without tools first."""
        replies: list[Message] = [{}, {"tool_calls": [{}]}]
        beside: list[list[Any] | None] = [None, [{}]]
        ends = [self.end, *(self.end_of(reply, tools) for tools in beside for reply in replies)]
        return tuple(dict.fromkeys(end.token for end in ends if end.token is not None))

    def _learn_end(self) -> TurnEnd:
        """How the reply of a small conversation ends."""
        try:
            text = self.render(_TURNS, None, for_reply=False)
        except Dropped as dropped:
            raise self._unusable("cannot render a conversation", f": {dropped.detail}") from dropped
        if _SENTINEL not in text:
            raise self._unusable("leaves the assistant's words out", "")
        return self._first_end(text)

    def _unusable(self, what: str, detail: str) -> ConfigError:
        text = f"template {self._name} {what}{detail}; choose another template"
        return ConfigError(Problem("template-renders-nothing", "template", text))

    def _first_end(self, text: str) -> TurnEnd:
        """The first special token after the sentinel."""
        after = text.rpartition(_SENTINEL)[2]
        ends = [(after.index(token), -len(token), token) for token in self._special if token in after]
        if not ends:
            return TurnEnd(None, after[len(after.rstrip()) :])
        start, _, token = min(ends)
        return TurnEnd(token, after[start + len(token) :])

    def _learn_end_beside_tools(self) -> TurnEnd:
        """As without tools where it cannot be learned."""
        text = self._once_or_none(_TURNS, [_TOOL], False, self._more)
        found = self._first_end(text) if text is not None and _SENTINEL in text else self.end
        return found if found.token is not None else self.end

    def _learn_end_of_calls(self, has_tools: bool) -> TurnEnd:
        """As of a text where it cannot be learned."""
        tools = [_TOOL] if has_tools else None
        other = self.end_of({}, tools)
        one, two = (self._render_calls(number, tools) for number in (1, 2))
        if one is None or _SENTINEL not in one:
            return other
        after = one.rpartition(_SENTINEL)[2]
        closing = after.rstrip()
        token = max((some for some in self._special if closing.endswith(some)), key=len, default=None)
        if token is None or token.startswith(("</", "[/")) or (other.token is not None and other.token in after):
            return other
        between = "".join(two.split(_SENTINEL)[1:-1]) if two is not None else ""
        return other if token in between else TurnEnd(token, after[len(closing) :])  # else it closes a call

    def _render_calls(self, number: int, tools: list[dict[str, Any]] | None) -> str | None:
        """A conversation whose reply has so many calls; None where the template refuses it."""
        calls = [
            {"id": f"call0000{n}", "type": "function", "function": {"name": "look", "arguments": {"key": _SENTINEL}}}
            for n in range(number)
        ]
        try:
            return self.render([_QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}], tools, False)
        except Dropped:
            return None

    def _learn_openers(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
        """Markers before the contents of a conversation, less those that end a turn."""
        words = ["words of one", "words of two", "words of three", "words of four"]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, words)]
        try:
            text = self.render(turns, None, for_reply=False)
        except Dropped:
            return frozenset()
        places = [text.find(some) for some in words]
        if -1 in places or places != sorted(places):
            return frozenset()
        ends = [place + len(some) for place, some in zip(places, words)]
        own = {"bos_token", "eos_token", "pad_token", "unk_token"} & tokenizer.special_tokens_map.keys()
        closing = {str(getattr(tokenizer, name)) for name in own} | _markers(text[ends[-1] :], tokenizer)
        opening = {marker for end, place in zip(ends, places[1:]) for marker in _markers(text[end:place], tokenizer)}
        return frozenset(marker for marker in opening - closing if not _NO_TURN.search(marker))

    def check_not_rendered(self, text: str) -> None:
        """Raises Dropped where a text holds markers that open a turn: it was rendered before."""
        for marker in self.openers:
            if marker in text:
                raise Dropped("already_rendered", repr(marker))
        if (text[:1] in "<[" or text[:1].isspace()) and (found := _KNOWN_START.match(text)):
            raise Dropped("already_rendered", repr(found.group().strip()))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's special and added tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token.strip()]


def _markers(text: str, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    special = {token for token in special_tokens(tokenizer) if token in text and not token.isalnum()}
    return special | set(_MARKER.findall(text))


def _date_variables(date: str | None, text: str) -> dict[str, Any]:
    """What gives a template this day for today; date_string where it is not made of strftime_now."""
    if date is None:
        return {}
    day = datetime.fromisoformat(date)
    if STRFTIME_NOW in text:
        return {STRFTIME_NOW: day.strftime}
    return {DATE_STRING: day.strftime("%d %b %Y")} if DATE_STRING in text else {}
