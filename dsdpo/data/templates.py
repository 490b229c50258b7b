"""Examples -> token ids with a tokenizer and a chat template.

A reply is the text that the template puts after the prompt, up to and with its end-of-turn token. Prompt and reply
are tokenized together, as the model will see them, and split where the prompt alone ends. Where tokens merge over
that border the split is made where the two tokenizations part, and counted (`diverged`); TRL does the same.

What stands before the prompt's last special token is tokenized once: the ids before it do not depend on what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dsdpo.compat import chat_renderer
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.messages import assistant
from dsdpo.data.named_templates import NAMED, PLAIN
from dsdpo.data.tokens import Tokens
from dsdpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "words of the reply"


def load_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id."""
    from transformers import AutoTokenizer  # here, since finding a prepared set takes no tokenizer

    return AutoTokenizer.from_pretrained(model_name_or_path)


@dataclass(frozen=True)
class EncodedExample:
    """An example as token ids, not truncated; each completion ends with its only end-of-turn token.

    Attributes:
        diverged: the prompt's last tokens merged with a completion and belong to the completions now.
        notes: what the template did that is no reason to drop the record; the summary counts each text.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    diverged: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Texts:
    """What gets tokenized for an example: the prompt, and the prompt with each completion (None: an empty one)."""

    prompt: str
    replied: tuple[str | None, ...]
    as_chat: bool


class ExampleEncoder:
    """A tokenizer with a template.

    Args:
        tokenizer: of the model to train.
        template: as the run config names it.
        default_system: system message for conversations without one.

    Raises:
        ConfigError: the tokenizer lacks tokens that the template needs, or the template cannot be rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, default_system: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("model_name_or_path: the tokenizer has no eos_token; set one in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer)
        self.template = template
        self.default_system = default_system
        self.eos_id: int = tokenizer.eos_token_id
        self.end_id = self.eos_id
        self._renderer = chat_renderer(tokenizer, NAMED[template].jinja if template in NAMED else None)
        self._is_own = template not in NAMED and template not in PLAIN and tokenizer.chat_template is not None
        self._has_chat = template in NAMED or self._is_own
        self._bos = _implied_bos(tokenizer)
        self._tail = ""
        self._appends_eos = True
        if template in NAMED:
            _check_tokens(tokenizer, template)
        if self._has_chat:
            self._learn_end_of_turn()

    # --- the template ---

    def _learn_end_of_turn(self) -> None:
        """Find the token that ends a reply, and what the template writes after it, on a small conversation."""
        turns = [{"role": "user", "content": "question"}, *assistant(_SENTINEL)]
        try:
            text = self._render(turns, None, for_reply=False)
        except Dropped as dropped:
            raise ConfigError(f"template {self.template} cannot render a conversation: {dropped.detail}") from dropped
        if _SENTINEL not in text:
            raise ConfigError(f"template {self.template} leaves the assistant's words out; choose another template")
        after = text[text.rindex(_SENTINEL) + len(_SENTINEL) :]
        ends = [(after.index(token), -len(token), token) for token in _special_tokens(self.tokenizer) if token in after]
        if not ends:
            self._tail = after[len(after.rstrip()) :]
            return
        start, _, token = min(ends)
        self.end_id = self.tokenizer.convert_tokens_to_ids(token)
        self._tail = after[start + len(token) :]
        self._appends_eos = False

    def _render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, for_reply: bool) -> str:
        try:
            return self._renderer(list(messages), tools or None, for_reply)
        except TemplateError as error:
            raise Dropped("template_error", str(error)) from error

    def check_supports(self, example: Example) -> None:
        """Raises ConfigError where the example is a conversation and nothing says how to write one."""
        if not self._has_chat and self.template not in PLAIN and not isinstance(example.prompt, str):
            raise ConfigError(
                "template is default, but the tokenizer has no chat template and the data are conversations; set "
                f"template to {', '.join(NAMED)}, or to none for the bare text of the messages"
            )

    # --- text ---

    def _texts(self, example: Example) -> _Texts:
        prompt, completions = example.prompt, example.completions
        if isinstance(prompt, str) and self.template in NAMED:
            prompt = [{"role": "user", "content": prompt}]
            completions = tuple(assistant(str(text)) for text in completions)
        if isinstance(prompt, str):
            return self._plain_texts(prompt, [str(text) for text in completions])
        answers = [answer for answer in completions if not isinstance(answer, str)]
        assert len(answers) == len(completions), "an example is all text or all messages"
        prompt = self._with_system(prompt)
        spoken = [*prompt, *(message for answer in answers for message in answer)]
        if not self._is_own and (example.tools or any(_uses_tools(message) for message in spoken)):
            raise Dropped("no_tools_in_template", f"template {self.template} does not")
        if not self._has_chat:
            if self.template not in PLAIN:
                raise Dropped("no_template")
            return self._plain_texts(plain_prompt(prompt), [answer[0]["content"] for answer in answers])
        replied = (None if _is_empty(answer[0]) else self._replied(prompt, answer, example.tools) for answer in answers)
        return _Texts(self._render(prompt, example.tools, for_reply=True), tuple(replied), as_chat=True)

    def _plain_texts(self, prompt: str, completions: Sequence[str]) -> _Texts:
        end = self.tokenizer.eos_token
        replied = tuple(prompt + _without_end(text, end) if text else None for text in completions)
        return _Texts(prompt, replied, as_chat=False)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if not self.default_system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.default_system}, *messages]

    def _replied(self, prompt: list[Message], answer: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """The conversation with its last reply, cut after the end-of-turn token."""
        end = str(self.tokenizer.convert_ids_to_tokens(self.end_id))
        reply = {**answer[0], "content": _without_end(answer[0]["content"], end)}
        text = self._render([*prompt, reply], tools, for_reply=False)
        if not text.endswith(self._tail):
            raise Dropped("own_end", repr(text[-40:]))
        return text[: len(text) - len(self._tail)]

    # --- token ids ---

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample | Dropped]:
        """Token ids of many examples, in order; one that the template cannot hold gives its refusal instead."""
        prepared: list[tuple[_Texts, list[str]] | Dropped] = []
        for example in examples:
            try:
                texts = _checked(self._texts(example))
                prepared.append((texts, self._parts(texts)))
            except Dropped as dropped:
                prepared.append(dropped)
        ids = self.tokens.encode(part for some in prepared if not isinstance(some, Dropped) for part in some[1])
        encoded: list[EncodedExample | Dropped] = []
        for some in prepared:
            if isinstance(some, Dropped):
                encoded.append(some)
                continue
            texts, (shared, *rests) = some
            try:
                encoded.append(self._encoded(texts, [ids[shared] + ids[rest] for rest in rests]))
            except Dropped as dropped:
                encoded.append(dropped)
        return encoded

    def _parts(self, texts: _Texts) -> list[str]:
        """What the texts share up to a border, then the rest of each; the ids of a text are those of its two parts."""
        given = _given(texts)
        border = self.tokens.last_border(texts.prompt)
        if not all(text.startswith(texts.prompt[:border]) for text in given):
            border = 0
        return [texts.prompt[:border], *(text[border:] for text in given)]

    def _encoded(self, texts: _Texts, ids: list[list[int]]) -> EncodedExample:
        """ids: of the prompt, then of each text with a completion that is not empty."""
        ends_itself = texts.as_chat and not self._appends_eos
        prompt, *given = [self._with_bos(some, texts.as_chat) for some in ids]
        end_id = self.end_id if texts.as_chat else self.eos_id
        if not ends_itself:
            given = [some + [end_id] for some in given]
        rest = iter(given)
        whole = [prompt + [end_id] if text is None else next(rest) for text in texts.replied]
        shared = min(_shared_length(prompt, some) for some in whole)
        if shared == 0:
            raise Dropped("no_shared_token", "an empty prompt, or one that merges with the reply")
        completions = [some[shared:] for some in whole]
        for completion in completions:
            if completion.count(end_id) != 1 or completion[-1] != end_id:
                raise Dropped("end_inside")
        if has_equal(completions):
            raise Dropped("same_tokens")
        return EncodedExample(prompt[:shared], completions, diverged=shared < len(prompt))

    def _with_bos(self, ids: list[int], as_chat: bool) -> list[int]:
        """Put BOS in front where the tokenizer would, unless it is there; a tokenizer's own template is trusted."""
        trusted = as_chat and self._is_own
        if self._bos is None or trusted or ids[:1] == [self._bos]:
            return ids
        return [self._bos, *ids]

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Ids that ask for a reply to `messages`. Raises Dropped when the template cannot hold them."""
        messages = self._with_system(messages)
        text = self._render(messages, None, for_reply=True) if self._has_chat else plain_prompt(messages)
        return self._with_bos(self.tokens.encode([text])[text], as_chat=self._has_chat)


def has_equal(completions: Sequence[list[int]]) -> bool:
    """Whether two completions have the same tokens."""
    return any(a == b for i, a in enumerate(completions) for b in completions[:i])


def plain_prompt(messages: Sequence[Message]) -> str:
    """Messages without a template: the bare texts, each followed by one newline."""
    return "".join(f"{message['content']}\n" for message in messages)


def _implied_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS if the tokenizer puts it before plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids[0] == tokenizer.bos_token_id else None


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token.strip()]


def _check_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """A family's template on another family's tokenizer would cut its markers into pieces the model never saw."""
    for token in NAMED[template].tokens:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise ConfigError(
                f"template {template} needs the token {token}, which this model's tokenizer lacks; set template: "
                "default, or none"
            )
    if template == "llama2" and tokenizer.bos_token is None:
        raise ConfigError("template llama2 needs a bos_token, which this model's tokenizer lacks; set template: none")


def _without_end(text: str, end: str) -> str:
    """Drop an end-of-turn token that the data wrote out, so that there is one and not two."""
    bare = text.rstrip()
    return bare.removesuffix(end) if bare.endswith(end) else text


def _is_empty(message: Message) -> bool:
    return not message["content"] and "tool_calls" not in message


def _uses_tools(message: Message) -> bool:
    return message["role"] == "tool" or "tool_calls" in message


def _given(texts: _Texts) -> list[str]:
    """The texts to tokenize, prompt first."""
    return [texts.prompt, *(text for text in texts.replied if text is not None)]


def _checked(texts: _Texts) -> _Texts:
    """The same texts, if the tokenizer can take them."""
    for text in _given(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Dropped("broken_unicode", "a lone surrogate") from error
    return texts


def _shared_length(prompt: list[int], whole: list[int]) -> int:
    """Number of tokens that both begin with."""
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
