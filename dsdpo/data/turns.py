"""Which words of a dialogue the loss sees: the turns that are trained, and what is masked in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Message
from dsdpo.data.formats.names import is_empty, training_mark
from dsdpo.data.shapes import REASONING, shared_length

Range: TypeAlias = tuple[int, int]  # characters start ... end-1 of a text

DETAIL = "train_detail"  # Axolotl's key: [{"begin_offset": 0, "end_offset": 9, "train": false}], the end included
_NO, _YES = ("false", "0", "0.0", "no"), ("true", "1", "1.0", "yes")
_CLOSED = re.compile(r"</(think|thinking|thought|reasoning)>\s*")


@dataclass(frozen=True)
class Turn:
    """A reply in the text of its conversation.

    Attributes:
        before: the conversation up to the reply, as it asks for one.
        whole: with the reply, up to the end of its turn.
        end: the token at the end, where a chat template writes it; None: it is to be put there.
        masked: ranges of `whole` that the loss does not see.
    """

    before: str
    whole: str
    end: str | None
    masked: tuple[Range, ...] = ()

    @property
    def range(self) -> Range:
        """Of the reply in `whole`."""
        is_prefix = self.whole.startswith(self.before)
        return len(self.before) if is_prefix else shared_length(self.before, self.whole), len(self.whole)


@dataclass(frozen=True)
class Reply:
    """A text that gets tokenized: the prompt with a completion.

    Attributes:
        text: of both; None: an empty completion.
        end: the token at its end, where a chat template writes it; None: it is to be put there.
        turns: ranges of `text` that are replies to train; the last one reaches to its end.
        masked: ranges of `text` in them that the loss does not see.
    """

    text: str | None
    end: str | None
    turns: tuple[Range, ...] = ()
    masked: tuple[Range, ...] = ()


def joined(turns: Sequence[Turn]) -> list[Reply]:
    """The texts of a dialogue's turns, as few as possible.

    A turn needs no text of its own where a later text begins with it. Some templates write earlier turns in another way
    than the last one, such as without its thoughts: then each turn is trained behind what a chat would put before it.
    """
    replies: list[Reply] = []
    for turn in turns:
        at = next((i for i, reply in enumerate(replies) if _is_begun_by(turn.whole, reply)), None)
        earlier = Reply(None, None) if at is None else replies.pop(at)
        ranges, masked = (*earlier.turns, turn.range), (*earlier.masked, *turn.masked)
        replies.append(Reply(turn.whole, turn.end, ranges, masked))
    return replies


def _is_begun_by(whole: str, reply: Reply) -> bool:
    return reply.end is not None and reply.text is not None and whole.startswith(reply.text)


def is_trained(message: Message) -> bool:
    """Whether a message is a reply that is not marked as left out of the loss (`train: false`, `weight: 0`)."""
    if message["role"] != "assistant":
        return False
    return len(message) == 2 or all(says_trained(key, value) is not False for key, value in message.items())


def says_trained(key: str, value: Any) -> bool | Literal["?"] | None:
    """Whether a key of a message says that it is trained; None of other keys, "?" where its value is no yes or no."""
    mark = None if is_empty(value) else training_mark(key)
    if mark is None:
        return None
    said = str(value).strip().lower()
    if said not in (*_NO, *_YES):
        return "?"
    return (said in _YES) == (mark == "trained")


def masked_in(message: Message, before: str, whole: str, mask_thinking: bool) -> tuple[Range, ...]:
    """Ranges of a conversation's text that its last message masks.

    Args:
        message: the reply; its `train_detail` masks characters of its content.
        before, whole: see `Turn`.
        mask_thinking: whether its thoughts are masked, with the tags around them.

    Raises:
        Dropped: `train_detail` cannot be read, or the content does not stand in the text as it is.
    """
    start = Turn(before, whole, None).range[0]
    found = _thoughts(message, before, whole, start) if mask_thinking else []
    if len(message) > 2 and not is_empty(message.get(DETAIL)):
        found += _details(message, whole, start)
    return tuple(found)


def _thoughts(message: Message, before: str, whole: str, start: int) -> list[Range]:
    reply, ranges, at = whole[start:], [], 0
    for closed in _CLOSED.finditer(reply):
        opened = reply.find(f"<{closed[1]}>", at, closed.start())
        if opened >= 0 or (at == 0 and before.rstrip().endswith(f"<{closed[1]}>")):
            ranges.append((start + max(opened, 0), start + closed.end()))
            at = closed.end()
    for key in REASONING if not ranges else ():
        text = message.get(key)
        if isinstance(text, str) and text.strip() and (found := reply.find(text.strip())) >= 0:
            return [(start + found, start + found + len(text.strip()))]
    return ranges


def _details(message: Message, whole: str, start: int) -> list[Range]:
    content, details = message["content"] or "", message[DETAIL]
    bare = content.strip()
    if whole.count(bare, start) != 1:
        raise Dropped("content_not_found", repr(bare[:60]))
    first = whole.index(bare, start) - (len(content) - len(content.lstrip()))
    ranges = []
    for detail in details if isinstance(details, list) else [details]:
        begin, end = (detail.get(key) if isinstance(detail, dict) else None for key in ("begin_offset", "end_offset"))
        if not isinstance(begin, int) or not isinstance(end, int) or not 0 <= begin <= end < len(content):
            raise Dropped("bad_train_detail", str(detail)[:80])
        if detail.get("train", True) is False:
            ranges.append((first + begin, first + end + 1))
    return ranges
