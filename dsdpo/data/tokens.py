"""Texts -> token ids, and where a text can be cut without changing them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.tokenization_utils_base import AddedToken


class Tokens:
    """Token ids of texts that hold their special tokens as text: nothing is put around them.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        firm = [] if self._backend is None or tokenizer.split_special_tokens else _firm_tokens(tokenizer)
        self._firm = re.compile("|".join(map(re.escape, firm))) if firm else None

    def last_border(self, text: str) -> int:
        """Where the last special token of `text` begins at which the ids part, however the text goes on; or 0.

        A tokenizer looks for such tokens first and takes what stands between them on its own. So for a border b,
        ids(text + more) = ids(text[:b]) + ids(text[b:] + more).
        """
        border = 0
        if self._firm is not None:
            for found in self._firm.finditer(text):
                border = found.start()
        return border

    def segments(self, text: str) -> list[str]:
        """A text in parts whose ids, one after another, are its ids: cut where its special tokens begin."""
        if self._firm is None:
            return [text]
        cuts = dict.fromkeys([0, *(found.start() for found in self._firm.finditer(text)), len(text)])
        return [text[start:end] for start, end in itertools.pairwise(cuts)]

    def beginnings(self, text: str, places: Iterable[int]) -> list[str]:
        """What `before` needs the ids of, beside those of the segments."""
        return [part for place in places if (part := self._split(text, place)[1])]

    def before(self, text: str, place: int, ids: Mapping[str, list[int]]) -> tuple[int, bool]:
        """How many tokens of a text lie before a place, and whether none reaches over it.

        Args:
            place: characters of the text before it.
            ids: by text, of the segments and of `beginnings`.
        """
        segments, part = self._split(text, place)
        count = sum(len(ids[segment]) for segment in segments[:-1])
        if not part:
            return count + len(ids[segments[-1]]), True
        whole, begun = ids[segments[-1]], ids[part]
        shared = shared_ids(begun, whole)
        return count + shared, shared == len(begun)

    def _split(self, text: str, place: int) -> tuple[list[str], str]:
        """(the segments up to the one that holds what is before a place, the beginning of that one; "": all of it)."""
        taken: list[str] = []
        for segment in self.segments(text):
            taken.append(segment)
            if len(segment) >= place:
                return taken, segment[:place] if len(segment) > place else ""
            place -= len(segment)
        return taken, ""

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Token ids by text; a text that comes twice is tokenized once."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        return dict(zip(unique, self._batch(unique)))

    def _batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            encoding = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            return encoding["input_ids"]
        # what the tokenizer's own call does, less the offsets, masks and copies that nobody reads here
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def shared_ids(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    if other[: len(one)] == one:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _firm_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that are found in the text as it stands, whatever is before them."""
    added = list(tokenizer.added_tokens_decoder.values())
    return [str(token) for token in added if _stands_alone(token) and not _can_overlap(str(token), added)]


def _stands_alone(token: AddedToken) -> bool:
    return not (token.normalized or token.lstrip or token.single_word)


def _can_overlap(token: str, added: Iterable[AddedToken]) -> bool:
    """Whether an added token that begins earlier in a text can reach into `token`."""
    return any(
        token in other[1:] or any(other.endswith(token[:n]) for n in range(1, min(len(token), len(other))))
        for other in map(str, added)
    )
