"""What one record of a data set asks the model to learn: as text, and as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

MAX_COMPLETIONS = 16
DIGEST_BYTES = 16
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])

Message: TypeAlias = dict[str, Any]
_MASKED = -1  # no token id: what follows it in a digest is the loss mask


@dataclass(frozen=True)
class Example:
    """A prompt with K completions, either all text or all messages.

    Attributes:
        prompt: text, or messages ({"role", "content"}) from an optional system message to a user or tool message.
        completions: K of 1 to 16; each is text, or messages in a list: one of the assistant, or for supervised training
            turns that begin and end with one. Of those that are compared, the best comes first.
        scores: a rating for each completion that came with the record, None where there is none. They are no
            log-probs.
        weight: factor on the example's loss.
        tools: function descriptions for the chat template, or None.
        template_kwargs: further variables of the chat template, from the record's chat_template_kwargs.
        notes: what happened to the record on its way that is no reason to drop it; the summary counts each text.
        compares: whether the completions are compared with each other, and so must differ.
    """

    prompt: str | list[Message]
    completions: tuple[str | list[Message], ...]
    scores: tuple[float | None, ...]
    weight: float = 1.0
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    compares: bool = True

    def __post_init__(self) -> None:
        assert 1 <= len(self.completions) <= MAX_COMPLETIONS, f"{len(self.completions)} completions"
        assert len(self.scores) == len(self.completions), "one score for each completion"


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids.

    Attributes:
        prompt_ids: int64 [p]; p may be 0. Then the first token of each completion is not scored, since nothing
            predicts it.
        completion_ids: K arrays, int64 [n_k], each with its end-of-turn token.
        loss_mask: K arrays, bool [n_k], true where a token is scored. None: all of them are.
    """

    prompt_ids: np.ndarray
    completion_ids: tuple[np.ndarray, ...]
    loss_mask: tuple[np.ndarray, ...] | None = None

    def is_scored(self, completion: int) -> np.ndarray:
        """bool [n_k]: the tokens of a completion that the loss sees."""
        size = len(self.completion_ids[completion])
        scored = np.ones(size, dtype=bool) if self.loss_mask is None else self.loss_mask[completion].copy()
        if len(self.prompt_ids) == 0:
            scored[:1] = False
        return scored

    @property
    def loss_tokens(self) -> list[int]:
        """Scored tokens of each completion."""
        if self.loss_mask is None and len(self.prompt_ids):
            return list(map(len, self.completion_ids))
        return [int(self.is_scored(k).sum()) for k in range(len(self.completion_ids))]


def example_digest(
    prompt_ids: Sequence[int] | np.ndarray,
    completion_ids: Sequence[Sequence[int] | np.ndarray],
    loss_mask: Sequence[Sequence[bool] | np.ndarray] | None = None,
) -> bytes:
    """128 bits that stand for an example's token ids and mask: reference log-probs are stored and found by them.

    The lengths come first, so that [1, 2], [3] and [1], [2, 3] differ. An example without a mask has the digest that it
    had before there were masks.
    """
    parts = [np.asarray(ids, dtype="<i8") for ids in (prompt_ids, *completion_ids)]
    lengths = np.array([len(ids) for ids in parts], dtype="<i8")
    if loss_mask is not None:
        parts += [np.array([_MASKED], dtype="<i8"), *(np.asarray(mask, dtype="<i8") for mask in loss_mask)]
    return hashlib.blake2b(np.concatenate([lengths, *parts]).tobytes(), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of B examples, which have N completions together.

    Attributes:
        prompt: int64 [B].
        counts: int64 [B], completions of each example.
        completions: int64 [N], tokens of each completion, example after example.
        loss_tokens: int64 [N], those that are scored.
    """

    prompt: np.ndarray
    counts: np.ndarray
    completions: np.ndarray
    loss_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample]) -> Lengths:
        """Counted from token ids."""

        def array(values: Sequence[int]) -> np.ndarray:
            return np.array(values, dtype=np.int64)

        return cls(
            prompt=array([len(example.prompt_ids) for example in examples]),
            counts=array([len(example.completion_ids) for example in examples]),
            completions=array([len(ids) for example in examples for ids in example.completion_ids]),
            loss_tokens=array([n for example in examples for n in example.loss_tokens]),
        )

    @classmethod
    def from_table(cls, table: np.ndarray) -> Lengths:
        """Of examples with K completions each, all of whose tokens are scored.

        Args:
            table: int [B, 1 + K]: tokens of the prompt, and of each completion.
        """
        completions = table[:, 1:].reshape(-1).astype(np.int64)
        counts = np.full(len(table), table.shape[1] - 1, dtype=np.int64)
        return cls(table[:, 0].astype(np.int64), counts, completions, completions)

    def select(self, indices: Sequence[int]) -> Lengths:
        """Of some of the examples, in this order."""
        taken = np.asarray(indices, dtype=np.int64)
        counts = self.counts[taken]
        shift = self.starts[taken] - (np.cumsum(counts) - counts)
        places = np.repeat(shift, counts) + np.arange(counts.sum())
        return Lengths(self.prompt[taken], counts, self.completions[places], self.loss_tokens[places])

    @property
    def starts(self) -> np.ndarray:
        """int64 [B]: where each example's completions begin among all N."""
        return np.cumsum(self.counts) - self.counts

    @property
    def examples(self) -> np.ndarray:
        """int64 [N]: the example that each completion belongs to."""
        return np.repeat(np.arange(len(self)), self.counts)

    @property
    def loss_tokens_of_examples(self) -> np.ndarray:
        """int64 [B]: scored tokens of each example, over all of its completions."""
        return np.bincount(self.examples, weights=self.loss_tokens, minlength=len(self)).astype(np.int64)

    def packed(self, share_prefix: bool) -> np.ndarray:
        """Tokens that each example takes in a micro-batch, int64 [B]: its prompt once, or once for each completion."""
        completions = np.bincount(self.examples, weights=self.completions, minlength=len(self)).astype(np.int64)
        return self.prompt * (1 if share_prefix else self.counts) + completions

    @property
    def padded(self) -> int:
        """Tokens of all examples with the prompt repeated for each completion: what plain training would compute."""
        return int(self.packed(share_prefix=False).sum())

    @property
    def per_pair(self) -> np.ndarray:
        """Tokens of the prompt and both completions, int64 [B, 3], of examples that have two."""
        return np.concatenate([self.prompt[:, None], self.completions.reshape(-1, 2)], axis=1)
