"""Examples -> token ids with a tokenizer and a chat template.

A reply is the text that the template puts after the prompt, up to and with its end-of-turn token. Prompt and reply
are tokenized together, as the model will see them, and split where the prompt alone ends. Where tokens merge over
that border the split is made where the two tokenizations part, and counted (`diverged`); TRL does the same.

What stands before the prompt's last special token is tokenized once: the ids before it do not depend on what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.texts import ExampleTexts, Texts, plain_prompt
from dsdpo.data.tokens import Tokens, shared_ids
from dsdpo.data.turns import Range, Reply
from dsdpo.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of an id on Hugging Face at a revision."""
    from transformers import AutoTokenizer  # here, since finding a prepared set takes no tokenizer

    return AutoTokenizer.from_pretrained(model_name_or_path, revision=revision or "main")


@dataclass(frozen=True)
class EncodedExample:
    """An example as token ids, not truncated; each reply ends with its only end-of-turn token.

    Attributes:
        loss_mask: for each completion, which of its tokens the loss sees; None: all.
        compares: whether the completions are compared with each other, and so must differ.
        diverged: the prompt's last tokens merged with a completion and belong to the completions now.
        notes: what the template did that is no reason to drop the record; the summary counts each text.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    diverged: bool
    notes: tuple[str, ...] = ()
    loss_mask: list[list[bool]] | None = None
    compares: bool = True


class ExampleEncoder:
    """A tokenizer with a template.

    Args:
        tokenizer: of the model to train.
        template: as the run config names it.
        default_system: system message for conversations without one.
        date: YYYY-MM-DD that a template writes as today's; None: today.
        mask_thinking: whether the loss does not see thoughts.

    Raises:
        ConfigError: the tokenizer lacks tokens that the template needs, or the template cannot be rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        default_system: str | None = None,
        date: str | None = None,
        mask_thinking: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            text = "model_name_or_path: the tokenizer has no eos_token; set one in tokenizer_config.json"
            raise ConfigError(Problem("tokenizer-eos", "model_name_or_path", text))
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self._texts = ExampleTexts(tokenizer, template, default_system, date, mask_thinking)
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
        as_chat = bool(example.prompt) and self._texts.found.text is not None
        wrapped = self._chat is not None and (as_chat or not isinstance(example.prompt, str))
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
        for some, example in zip(prepared, examples):
            if isinstance(some, Dropped):
                encoded.append(some)
                continue
            texts, parts = some
            try:
                encoded.append(self._encoded(texts, parts, ids, example.compares))
            except Dropped as dropped:
                encoded.append(dropped)
        return encoded

    def _parts(self, texts: Texts) -> list[str]:
        """What the texts share up to a border, then the rest of each; the ids of a text are those of its two parts.

        Behind that, what tells the tokens of its turns.
        """
        given = _given(texts)
        border = self.tokens.last_border(texts.prompt)
        if not all(text.startswith(texts.prompt[:border]) for text in given):
            border = 0
        parts = [texts.prompt[:border], *(text[border:] for text in given)]
        for reply in texts.replies:
            if (text := reply.text) is not None and _is_seen_in_part(reply, texts):
                places = (place for range in (*reply.turns, *reply.masked) for place in range)
                parts += [*self.tokens.segments(text), *self.tokens.beginnings(text, places)]
        return parts

    def _encoded(
        self, texts: Texts, parts: list[str], known: Mapping[str, list[int]], compares: bool
    ) -> EncodedExample:
        """known: ids by text, of all `parts`."""
        start, rests = known[parts[0]], parts[1 : 1 + len(_given(texts))]
        prompt, *given = [self._with_bos(start + known[rest], texts.as_chat) for rest in rests]
        rest = iter(given)
        wholes = []
        for reply in texts.replies:
            replied = prompt if reply.text is None else next(rest)
            wholes.append(replied if reply.text is not None and reply.end is not None else [*replied, self._end(reply)])
        shared = min(shared_ids(prompt, some) for some in wholes)
        if shared == 0 and (prompt or compares):
            raise Dropped("no_shared_token", "an empty prompt, or one that merges with the reply")
        completions = [whole[shared:] for whole in wholes]
        masks: dict[int, list[bool]] = {}
        for number, (reply, whole) in enumerate(zip(texts.replies, wholes)):
            turns = [(shared if compares else shared_ids(prompt, whole), len(whole))]
            if turns[0][0] > shared:
                masks[number] = _mask(len(whole), turns, [])[shared:]
            if reply.text is not None and _is_seen_in_part(reply, texts):
                turns, masked = self._ranges(reply, reply.text, whole, known)
                masks[number] = _mask(len(whole), turns, masked)[shared:]
            for first, last in turns:
                self._check_turn(whole[first:last], reply, texts)
        if compares and has_equal(completions):
            raise Dropped("same_tokens")
        loss_mask = [masks.get(n, [True] * len(ids)) for n, ids in enumerate(completions)] if masks else None
        return EncodedExample(prompt[:shared], completions, shared < len(prompt), texts.notes, loss_mask, compares)

    def _end(self, reply: Reply) -> int:
        return self.eos_id if reply.end is None else self._id_of(reply.end)

    def _ranges(
        self, reply: Reply, text: str, whole: list[int], known: Mapping[str, list[int]]
    ) -> tuple[list[Range], list[Range]]:
        """First and last token (excluded) of the turns and of the masked ranges of a text with the ids `whole`.

        A token that merges over the beginning of a turn belongs to it. One of which a part is masked is masked.
        """
        own = [token for segment in self.tokens.segments(text) for token in known[segment]]
        shift = int(whole[: len(own)] != own)  # a BOS in front
        places = {
            place: self.tokens.before(text, place, known) for range in (*reply.turns, *reply.masked) for place in range
        }
        turns = [(places[start][0] + shift, places[end][0] + shift) for start, end in reply.turns]
        masked = [
            (places[start][0] + shift, places[end][0] + shift + (not places[end][1])) for start, end in reply.masked
        ]
        return [*turns[:-1], (turns[-1][0], len(whole))], masked

    def _check_turn(self, turn: list[int], reply: Reply, texts: Texts) -> None:
        """Raises Dropped where a turn does not end with its only end-of-turn token, or has nothing else."""
        end_id = self._end(reply)
        if reply.text is not None and turn == [end_id]:
            raise Dropped("template_leaves_out", "nothing but the end of the turn is left", "a reply")
        if turn[-1:] != [end_id]:
            found, wanted = (self.tokenizer.decode(some) for some in (turn[-3:], [end_id]))
            raise Dropped("own_end", f"it ends with {found!r}, others with {wanted}")
        ends = self._all_end_ids if texts.as_chat else (end_id,)
        if texts.prompt and sum(map(turn.count, ends)) != 1:
            raise Dropped("end_inside")

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
    return [texts.prompt, *(reply.text for reply in texts.replies if reply.text is not None)]


def _is_seen_in_part(reply: Reply, texts: Texts) -> bool:
    """Whether the loss sees less of a text than all tokens after the prompt."""
    return len(reply.turns) > 1 or bool(reply.masked) or reply.turns[0][0] > len(texts.prompt)


def _mask(size: int, turns: Sequence[Range], masked: Sequence[Range]) -> list[bool]:
    """Which of so many tokens the loss sees."""
    mask = [False] * size
    for ranges, is_seen in ((turns, True), (masked, False)):
        for first, last in ranges:
            mask[first:last] = [is_seen] * (last - first)
    return mask


def _checked(texts: Texts) -> Texts:
    """The same texts, if the tokenizer can take them."""
    for text in _given(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Dropped("broken_unicode", "a lone surrogate") from error
    return texts
