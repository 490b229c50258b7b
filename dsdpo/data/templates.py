"""Examples -> token ids with a tokenizer and a chat template.

A reply is the text that the template puts after the prompt, up to and with its end-of-turn token. Prompt and reply
are tokenized together, as the model will see them, and split where the prompt alone ends. Where tokens merge over
that border the split is made where the two tokenizations part, and counted (`diverged`); TRL does the same.

What stands before the prompt's last special token is tokenized once: the ids before it do not depend on what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.texts import ExampleTexts, Texts, plain_prompt
from dsdpo.data.tokens import Tokens
from dsdpo.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


class ExampleEncoder:
    """A tokenizer with a template.

    Args:
        tokenizer: of the model to train.
        template: as the run config names it.
        default_system: system message for conversations without one.
        date: YYYY-MM-DD that a template writes as today's; None: today.

    Raises:
        ConfigError: the tokenizer lacks tokens that the template needs, or the template cannot be rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        default_system: str | None = None,
        date: str | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            text = "model_name_or_path: the tokenizer has no eos_token; set one in tokenizer_config.json"
            raise ConfigError(Problem("tokenizer-eos", "model_name_or_path", text))
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self._texts = ExampleTexts(tokenizer, template, default_system, date)
        self._chat = self._texts.chat
        self.end_id: int = cast(int, tokenizer.convert_tokens_to_ids(self._texts.end))
        self._bos = _implied_bos(tokenizer)
        self._ids: dict[str, int] = {}

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template with which `apply_chat_template` gives this encoder's ids; None where there is none."""
        text = self._texts.found.text
        if self._chat is None or text is None:
            return self.tokenizer.chat_template if self._chat is not None else None
        if isinstance(text, dict):
            return text
        question = self._chat.render([{"role": "user", "content": "question"}], None, for_reply=True)
        bos = str(self.tokenizer.bos_token)
        begins = self._bos is None or not self._texts.found.is_named or question.startswith(bos)
        return text if begins else "{{ bos_token }}" + text

    def end_token(self, example: Example) -> str:
        """The token that ends the completions of such examples."""
        wrapped = self._chat is not None and (self._texts.found.text is not None or not isinstance(example.prompt, str))
        return self._texts.end if wrapped else str(self.tokenizer.eos_token)

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The tokens that end replies of all kinds, those with calls too; that of a text without tools first."""
        return tuple(dict.fromkeys([self._texts.end, *(self._chat.end_tokens if self._chat is not None else ())]))

    def check_supports(self, example: Example) -> None:
        """Raises ConfigError where the run's own options keep the example from being rendered."""
        self._texts.check_supports(example)

    # --- token ids ---

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample | Dropped]:
        """Token ids of many examples, in order; one that the template cannot hold gives its refusal instead."""
        prepared: list[tuple[Texts, list[str]] | Dropped] = []
        for example in examples:
            try:
                texts = _checked(self._texts.of(example))
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

    def _parts(self, texts: Texts) -> list[str]:
        """What the texts share up to a border, then the rest of each; the ids of a text are those of its two parts."""
        given = _given(texts)
        border = self.tokens.last_border(texts.prompt)
        if not all(text.startswith(texts.prompt[:border]) for text in given):
            border = 0
        return [texts.prompt[:border], *(text[border:] for text in given)]

    def _encoded(self, texts: Texts, ids: list[list[int]]) -> EncodedExample:
        """ids: of the prompt, then of each text with a completion that is not empty."""
        prompt, *given = [self._with_bos(some, texts.as_chat) for some in ids]
        end_ids = [self.eos_id if end is None else self._id_of(end) for end in texts.ends]
        rest = iter(given)
        whole = []
        for text, end, end_id in zip(texts.replied, texts.ends, end_ids):
            replied = prompt if text is None else next(rest)
            whole.append(replied if text is not None and end is not None else [*replied, end_id])
        shared = min(_shared_length(prompt, some) for some in whole)
        if shared == 0:
            raise Dropped("no_shared_token", "an empty prompt, or one that merges with the reply")
        completions = [some[shared:] for some in whole]
        for completion, text, end_id in zip(completions, texts.replied, end_ids):
            if text is not None and completion == [end_id]:
                raise Dropped("template_leaves_out", "nothing but the end of the turn is left", "a reply")
            if completion[-1:] != [end_id]:
                found, wanted = (self.tokenizer.decode(some) for some in (completion[-3:], [end_id]))
                raise Dropped("own_end", f"it ends with {found!r}, others with {wanted}")
            if sum(map(completion.count, self._all_end_ids if texts.as_chat else (end_id,))) != 1:
                raise Dropped("end_inside")
        if has_equal(completions):
            raise Dropped("same_tokens")
        return EncodedExample(prompt[:shared], completions, shared < len(prompt), texts.notes)

    def _id_of(self, token: str) -> int:
        if token not in self._ids:
            self._ids[token] = cast(int, self.tokenizer.convert_tokens_to_ids(token))
        return self._ids[token]

    @property
    def stop_ids(self) -> list[int]:
        """Token ids at which an answer ends."""
        return list(dict.fromkeys([*self._all_end_ids, self.eos_id]))

    @cached_property
    def _all_end_ids(self) -> tuple[int, ...]:
        return tuple(map(self._id_of, self.end_tokens))

    def _with_bos(self, ids: list[int], as_chat: bool) -> list[int]:
        """Put BOS in front where the tokenizer would, unless it is there; a tokenizer's own template is trusted."""
        trusted = as_chat and not self._texts.found.is_named
        if self._bos is None or trusted or ids[:1] == [self._bos]:
            return ids
        return [self._bos, *ids]

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Ids that ask for a reply to `messages`. Raises Dropped when the template cannot hold them."""
        messages = self._texts.with_system(messages)
        text = self._chat.render(messages, None, for_reply=True) if self._chat is not None else plain_prompt(messages)
        return self._with_bos(self.tokens.encode([text])[text], as_chat=self._chat is not None)


def has_equal(completions: Sequence[list[int]]) -> bool:
    """Whether two completions have the same tokens."""
    return any(a == b for i, a in enumerate(completions) for b in completions[:i])


def _implied_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS if the tokenizer puts it before plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids[0] == tokenizer.bos_token_id else None


def _given(texts: Texts) -> list[str]:
    """The texts to tokenize, prompt first."""
    return [texts.prompt, *(text for text in texts.replied if text is not None)]


def _checked(texts: Texts) -> Texts:
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
