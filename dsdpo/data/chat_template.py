"""A run's chat template: where its text comes from, how it is rendered, and what begins and ends a turn in it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dsdpo.compat import chat_renderer
from dsdpo.config.templates import OWN, PLAIN, is_path
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Message
from dsdpo.data.named_templates import NAMED
from dsdpo.data.template_date import DATE_STRING, STRFTIME_NOW
from dsdpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "words of the reply"
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


@dataclass(frozen=True)
class TemplateText:
    """What `template` of a run config names.

    Attributes:
        text: of the template; None: the tokenizer's own, or none at all.
        is_named: it is one of ours, which knows roles and contents alone.
        is_plain: no template: prompt and completion as they stand.
    """

    text: str | None
    is_named: bool = False
    is_plain: bool = False


def find_template(template: str) -> TemplateText:
    """The text behind a template's name, path or model id.

    Raises:
        ConfigError: there is no such file, or no chat template in the folder or model.
    """
    if template == OWN:
        return TemplateText(None)
    if template in PLAIN:
        return TemplateText(None, is_plain=True)
    if template in NAMED:
        return TemplateText(NAMED[template].jinja, is_named=True)
    assert is_path(template), "the run config has been checked"
    if template.endswith((".jinja", ".jinja2")):
        try:
            return TemplateText(Path(template).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"template: {template} cannot be read: {error}; give the path of a .jinja file"
            ) from error
    return TemplateText(_template_of_model(template))


def _template_of_model(model: str) -> str:
    """The chat template of a folder, read without transformers, or of a hub id."""
    if Path(model).is_dir():
        try:
            text = _template_of_folder(Path(model))
        except (OSError, ValueError) as error:
            raise ConfigError(f"template: the files of {model} cannot be read: {error}") from error
    else:
        from transformers import AutoTokenizer

        try:
            text = AutoTokenizer.from_pretrained(model).get_chat_template()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"template: {model} is no folder, and no model with a chat template could be loaded: {error}"
            ) from error
    if not text:
        raise ConfigError(f"template: {model} has no chat template; name another one, or a .jinja file")
    return text


def _template_of_folder(folder: Path) -> str | None:
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8-sig")
    if not settings.is_file():
        return None
    read = json.loads(settings.read_bytes())
    found = read.get("chat_template") if isinstance(read, dict) else None
    if isinstance(found, list):
        found = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return found if isinstance(found, str) else None


class ChatTemplate:
    """A template that renders conversations for a tokenizer.

    Args:
        tokenizer: of the model to train.
        text: of the template; None: the tokenizer's own.
        name: for messages.
        date: YYYY-MM-DD that counts as today, or None: today.

    Attributes:
        end: the token that ends a reply; None where the template writes none.
        tail: what the template writes after it.
        openers: markers that open a turn.

    Raises:
        ConfigError: it cannot render a small conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None, name: str, date: str | None) -> None:
        self._renderer = chat_renderer(tokenizer, text)
        self._name = name
        self._more = _date_variables(date, str(text or tokenizer.chat_template))
        self.end, self.tail = self._learn_end(tokenizer)
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
        shown = [_with_arguments(message, as_text) for message in messages]
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
        printed = [] if as_text else [str(arguments) for arguments in _objects(shown)]
        if any(written in text for written in printed):
            bare = self._once_or_none(_without_quotes(shown), tools, for_reply, more)
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

    # --- what it writes around a turn ---

    def _learn_end(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str]:
        """The token that ends a reply, and what the template writes after it, on a small conversation."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _SENTINEL}]
        try:
            text = self.render(turns, None, for_reply=False)
        except Dropped as dropped:
            raise ConfigError(f"template {self._name} cannot render a conversation: {dropped.detail}") from dropped
        if _SENTINEL not in text:
            raise ConfigError(f"template {self._name} leaves the assistant's words out; choose another template")
        after = text[text.rindex(_SENTINEL) + len(_SENTINEL) :]
        ends = [(after.index(token), -len(token), token) for token in special_tokens(tokenizer) if token in after]
        if not ends:
            return None, after[len(after.rstrip()) :]
        start, _, token = min(ends)
        return token, after[start + len(token) :]

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


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The functions that a message calls: {"name", "arguments"}."""
    calls = message.get("tool_calls") or []
    functions = (call.get("function", call) if isinstance(call, dict) else {} for call in calls)
    return [function if isinstance(function, dict) else {} for function in functions]


def parsed_arguments(arguments: Any) -> Any:
    """Arguments in JSON text as the object that they are; anything else as it stands."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _with_arguments(message: Message, as_text: bool) -> Message:
    """A message whose calls have their arguments as objects, or as JSON text."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, as_text) for call in message["tool_calls"]]}


def _call_with_arguments(call: Any, as_text: bool) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_arguments(call["function"], as_text)}
    if "arguments" not in call:
        return call
    value = call["arguments"]
    if as_text:
        return {**call, "arguments": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    return {**call, "arguments": parsed_arguments(value)}


def _objects(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Arguments that are objects and not empty."""
    found = (call.get("arguments") for message in messages for call in calls_of(message))
    return [arguments for arguments in found if isinstance(arguments, dict) and arguments]


def _without_quotes(messages: Sequence[Message]) -> list[Message]:
    """The messages without single quotes in their texts, so that only the template can print Python; calls stay."""
    return [
        {key: value.replace("'", "") if isinstance(value, str) else value for key, value in message.items()}
        for message in messages
    ]
