"""Examples -> the texts that get tokenized, with a chat template and without."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsdpo.config.templates import NAMES
from dsdpo.data.chat_template import ChatTemplate
from dsdpo.data.contained import EARLIER_THOUGHTS, Containment
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.messages import assistant
from dsdpo.data.named_templates import NAMED
from dsdpo.data.shapes import REASONING, Conversation, shared_length
from dsdpo.data.template_files import find_template, template_beside
from dsdpo.data.turns import Reply, Turn, is_trained, joined, masked_in
from dsdpo.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOS_OPTIONAL = ("llama3",)  # was written for tokenizers without one, too


@dataclass(frozen=True)
class Texts:
    """What gets tokenized for an example.

    Attributes:
        prompt: alone.
        replies: it with each completion.
        as_chat: whether a chat template wrote them.
        notes: what it did that is no reason to drop the record.
    """

    prompt: str
    replies: tuple[Reply, ...]
    as_chat: bool
    notes: tuple[str, ...] = ()


class ExampleTexts:
    """Writes examples as texts.

    Args:
        tokenizer: of the model to train.
        template: as the run config names it.
        default_system: system message for conversations without one.
        date: YYYY-MM-DD that a template writes as today's; None: today.
        mask_thinking: whether the loss does not see thoughts.

    Attributes:
        found: what `template` names.
        chat: the chat template; None where there is none.
        end: the token that ends a reply.

    Raises:
        ConfigError: the tokenizer lacks tokens that the template needs, or the template cannot be rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        default_system: str | None,
        date: str | None,
        mask_thinking: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._mask_thinking = mask_thinking
        self.template = template
        self.default_system = default_system if default_system and not default_system.isspace() else None
        self.found = find_template(template)
        self.chat: ChatTemplate | None = None
        self.end = str(tokenizer.eos_token)
        self._containment = Containment()
        if self.found.is_named:
            _check_tokens(tokenizer, template)
        if self.found.text is not None or (tokenizer.chat_template is not None and not self.found.is_plain):
            self.chat = ChatTemplate(tokenizer, self.found.text, template, date)
            self.end = self.chat.end.token or self.end

    def check_supports(self, example: Example) -> None:
        """Raises ConfigError where the run's own options keep the example from being rendered."""
        prompt = [] if isinstance(example.prompt, str) else example.prompt
        if not prompt and self.found.text is None:
            return
        if self.chat is None:
            if not self.found.is_plain:
                raise ConfigError(Problem("no-template", "template", self._no_template()))
            return
        if not self.default_system or (prompt and self.with_system(prompt) is prompt):
            return
        try:
            self.of(example)
        except Dropped as dropped:
            try:
                self.of(example, with_system=False)
            except Dropped:
                return  # it is not default_system
            text = (
                f"default_system: the template cannot take this system message ({dropped}); without default_system "
                "such records are rendered. Unset it, or set another template"
            )
            raise ConfigError(Problem("default-system", "default_system", text)) from dropped

    def _no_template(self) -> str:
        names = f"{', '.join(NAMES)}, a .jinja file, or none for the bare text of the messages"
        if file := template_beside(str(self.tokenizer.name_or_path)):
            names = f"{file}, which holds the one of the model's processor, or to {names}"
        return (
            "template is default, but the tokenizer has no chat template and the data are conversations; set template "
            f"to {names}"
        )

    def of(self, example: Example, with_system: bool = True) -> Texts:
        """The texts of an example. Raises Dropped where the template cannot hold it."""
        prompt, completions = example.prompt, example.completions
        if isinstance(prompt, str) and prompt and self.found.text is not None:
            prompt = [{"role": "user", "content": prompt}]
            completions = tuple(assistant(str(text)) for text in completions)
        if isinstance(prompt, str):
            return self._plain_texts(prompt, [str(text) for text in completions])
        answers = [answer for answer in completions if not isinstance(answer, str)]
        assert len(answers) == len(completions), "an example is all text or all messages"
        prompt = self.with_system(prompt) if with_system else prompt
        spoken = [*prompt, *(message for answer in answers for message in answer)]
        if (self.chat is None or self.found.is_named) and (example.tools or any(map(_uses_tools, spoken))):
            raise Dropped("no_tools_in_template", f"template {self.template} does not")
        if self.chat is None:
            if not self.found.is_plain:
                raise Dropped("no_template")
            return self._bare_texts(prompt, answers, _not_read(example.template_kwargs, None))
        return self._chat_texts(self.chat, prompt, answers, example)

    def _plain_texts(self, prompt: str, completions: Sequence[str]) -> Texts:
        turns = [self._plain_turn(prompt, text) for text in completions]
        replies = (Reply(turn.whole, None, (turn.range,)) if turn else Reply(None, None) for turn in turns)
        return Texts(prompt, tuple(replies), as_chat=False)

    def _plain_turn(self, before: str, text: str) -> Turn | None:
        return Turn(before, before + _without_end(text, self.tokenizer.eos_token), None) if text else None

    def _bare_texts(self, prompt: list[Message], answers: Sequence[list[Message]], notes: tuple[str, ...]) -> Texts:
        """Without a template, contents alone are written."""
        replies: list[Reply] = []
        for answer in answers:
            for message in answer:
                if message["role"] == "assistant" and any(message.get(key) for key in REASONING):
                    raise Dropped("template_leaves_out", f"template {self.template}", "the reasoning of a reply")
            if not answer[-1]["content"]:
                replies.append(Reply(None, None))
                continue
            turns = []
            for number in _trained(answer):
                turn = self._plain_turn(plain_prompt([*prompt, *answer[:number]]), answer[number]["content"])
                assert turn is not None, "of several replies, none is empty"
                turns.append(self._with_masks(turn, answer[number]))
            replies += joined(turns)
        thoughts = any(message.get(key) for message in prompt for key in REASONING)
        notes = (EARLIER_THOUGHTS, *notes) if thoughts else notes
        return Texts(plain_prompt(prompt), tuple(replies), as_chat=False, notes=notes)

    def _with_masks(self, turn: Turn, message: Message) -> Turn:
        if len(message) == 2 and not self._mask_thinking:
            return turn
        return replace(turn, masked=masked_in(message, turn.before, turn.whole, self._mask_thinking))

    def _chat_texts(
        self, chat: ChatTemplate, prompt: list[Message], answers: Sequence[list[Message]], example: Example
    ) -> Texts:
        """The conversation as the template writes it, which contains all that was said."""
        for message in itertools.chain(prompt, *answers):
            if isinstance(message.get("content"), str):
                chat.check_not_rendered(message["content"])

        def render(messages: Sequence[Message], tools: list[dict[str, Any]] | None, for_reply: bool) -> str:
            return chat.render(messages, tools, for_reply, example.template_kwargs)

        def asks(messages: list[Message]) -> tuple[Conversation, str, tuple[str, ...]]:
            text = render(messages, example.tools, True)
            conversation = Conversation(messages, example.tools, example.template_kwargs, render)
            return conversation, text, self._containment.check_prompt(conversation, text)

        first, replies = asks(prompt), list[Reply]()
        notes = list(first[2])
        for answer in answers:
            if len(answer) == 1 and _is_empty(answer[0]):
                replies.append(Reply(None, chat.end_of(answer[0], example.tools).token))
                continue
            turns = []
            for number in _trained(answer):
                conversation, text, more = asks([*prompt, *answer[:number]]) if number else first
                turns.append(self._turn(chat, conversation, text, answer[number]))
                notes += more
            replies += joined(turns)
        notes += _not_read(example.template_kwargs, chat)
        return Texts(first[1], tuple(replies), as_chat=True, notes=tuple(dict.fromkeys(notes)))

    def _turn(self, chat: ChatTemplate, conversation: Conversation, text: str, message: Message) -> Turn:
        """A reply behind its conversation, whose text asks for it."""
        end = chat.end_of(message, conversation.tools)
        reply = _less_end(message, end.token or self.end)
        whole = conversation.render([*conversation.prompt, reply], conversation.tools, False)
        self._containment.check_reply(conversation, reply, text, whole)
        if not whole.startswith(text):
            _check_shared(text, whole)
        if not whole.endswith(end.tail):
            raise Dropped("own_end", f"it ends with {whole[-40:]!r}, others with {end.token or self.end}")
        return self._with_masks(Turn(text, whole[: len(whole) - len(end.tail)], end.token), reply)

    def with_system(self, messages: list[Message]) -> list[Message]:
        """With default_system in front, where there is one and no system message."""
        if not self.default_system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.default_system}, *messages]


def _trained(answer: Sequence[Message]) -> list[int]:
    """Numbers of the replies that the loss sees; one alone is always seen."""
    return [0] if len(answer) == 1 else [number for number, message in enumerate(answer) if is_trained(message)]


def _not_read(variables: dict[str, Any], chat: ChatTemplate | None) -> tuple[str, ...]:
    """Notes on a record's chat_template_kwargs that change nothing, such as a name with a typing error."""
    unread = [name for name in variables if chat is None or not chat.names(name)]
    return tuple(f"with {name} in chat_template_kwargs, which the chat template does not read" for name in unread)


def plain_prompt(messages: Sequence[Message]) -> str:
    """Messages without a template: the bare texts, each followed by one newline."""
    return "".join(f"{message['content']}\n" for message in messages)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """A family's template on another family's tokenizer would cut its markers into pieces the model never saw."""
    for token in NAMED[template].tokens:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            text = f"template {template} needs the token {token}, which this model's tokenizer lacks; set template: "
            raise ConfigError(Problem("template-tokens", "template", text + "default, or none"))
    if template not in _BOS_OPTIONAL and "bos_token" in NAMED[template].jinja and tokenizer.bos_token is None:
        text = f"template {template} needs a bos_token, which this model's tokenizer lacks; set template: none"
        raise ConfigError(Problem("template-tokens", "template", text))


def _check_shared(prompt: str, whole: str) -> None:
    """Raises Dropped where a text parts from its prompt before the reply begins, but for white space."""
    shared = shared_length(prompt, whole)
    if prompt[shared:].strip():
        raise Dropped("prompt_differs", f"{prompt[shared:][:40]!r} became {whole[shared:][:40]!r}")


def _without_end(text: str, end: str) -> str:
    """Drop an end-of-turn token that the data wrote out, so that there is one and not two."""
    bare = text.rstrip()
    return bare.removesuffix(end) if bare.endswith(end) else text


def _less_end(answer: Message, end: str) -> Message:
    """A reply less the end-of-turn token that the data wrote out."""
    content = answer.get("content")
    if not isinstance(content, str):
        return answer
    bare = _without_end(content, end)
    return answer if bare is content else {**answer, "content": bare}


def _is_empty(message: Message) -> bool:
    """Whether a reply says nothing: no content, no calls, no reasoning."""
    return not (message.get("content") or message.get("tool_calls") or any(message.get(key) for key in REASONING))


def _uses_tools(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))
