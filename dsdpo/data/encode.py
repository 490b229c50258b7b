"""Raw rows -> rows of a shard: format, template, tokens, truncation. Runs in the worker processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsdpo.config.schema import RunConfig
from dsdpo.data.digest import DIGEST_BYTES, pair_digest
from dsdpo.data.formats.preference import to_pair
from dsdpo.data.messages import Pair, Refused
from dsdpo.data.readers import RawRow, parse_row
from dsdpo.data.registry import DatasetEntry
from dsdpo.data.templates import EncodedPair, PairEncoder

_EXCERPT = 200  # characters of a refused row that are shown


@dataclass(frozen=True)
class Limits:
    """What a pair may measure, in tokens.

    Attributes:
        max_length: prompt + completion.
        truncation_mode: as in RunConfig.
        row_tokens: longest packed row, or None when no pair within max_length can exceed it.
        share_prefix: whether the prompt stands once in a row.
    """

    max_length: int
    truncation_mode: str
    row_tokens: int | None
    share_prefix: bool

    @classmethod
    def of(cls, config: RunConfig) -> Limits:
        """The run's limits. Two sequences of max_length are the most that a pair can fill."""
        can_exceed = config.row_tokens is not None and config.row_tokens < 2 * config.max_length
        return cls(
            max_length=config.max_length,
            truncation_mode=config.truncation_mode,
            row_tokens=config.row_tokens if can_exceed else None,
            share_prefix=config.share_prefix if can_exceed else True,
        )


def fit(pair: EncodedPair, limits: Limits, bos_id: int | None) -> tuple[EncodedPair, bool]:
    """Cut a pair to max_length.

    Args:
        pair: the whole pair.
        limits: the run's limits.
        bos_id: kept in front when the prompt's oldest tokens go.

    Returns:
        The pair that fits, and whether it was cut.

    Raises:
        Refused: nothing sensible is left, or truncation_mode is `refuse`, or the pair exceeds a packed row.
    """
    prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    over = len(prompt) + max(len(chosen), len(rejected)) - limits.max_length
    if over > 0:
        size = f"{over + limits.max_length} tokens, max_length is {limits.max_length}"
        if limits.truncation_mode == "refuse":
            raise Refused("longer than max_length", size)
        if limits.truncation_mode == "keep_start":
            room = limits.max_length - len(prompt)
            if room < 1:
                detail = f"{len(prompt)} tokens, max_length is {limits.max_length}"
                raise Refused("the prompt alone reaches max_length", detail)
            chosen, rejected = chosen[:room], rejected[:room]
            if chosen == rejected:
                raise Refused("chosen and rejected are the same once cut to max_length", size)
        else:
            kept = [bos_id] if bos_id is not None and prompt[0] == bos_id else []
            prompt = [*kept, *prompt[over + len(kept) :]]
            if len(prompt) == len(kept):
                raise Refused("a completion alone reaches max_length", size)
    _check_row(len(prompt), len(chosen), len(rejected), limits)
    return EncodedPair(prompt, chosen, rejected, pair.diverged), over > 0


def _check_row(prompt: int, chosen: int, rejected: int, limits: Limits) -> None:
    tokens = (1 if limits.share_prefix else 2) * prompt + chosen + rejected
    if limits.row_tokens is not None and tokens > limits.row_tokens:
        detail = f"{tokens} tokens, max_tokens_per_row is {limits.row_tokens}"
        raise Refused("longer than max_tokens_per_row", detail)


class RowEncoder:
    """Batches of raw rows -> batches of encoded ones, for `datasets.Dataset.map`.

    Args:
        encoder: tokenizer and template.
        entries: the sets, each with its formatting known.
        limits: in tokens.
    """

    def __init__(self, encoder: PairEncoder, entries: Sequence[DatasetEntry], limits: Limits) -> None:
        self.encoder = encoder
        self.entries = list(entries)
        self.limits = limits

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """
        Args:
            rows: columns `source`, `set` (number of the entry) and `row` (JSON, bytes).

        Returns:
            The columns of a shard, and `reason`, `detail`, `excerpt` (all empty for accepted rows), `truncated`,
            `diverged`.
        """
        pairs = [self.pair(raw, self.entries[number]) for raw, number in zip(rows["row"], rows["set"])]
        encoded = iter(self.encoder.encode([pair for pair in pairs if isinstance(pair, Pair)]))
        results = [self._accepted(pair, next(encoded)) if isinstance(pair, Pair) else _refused(pair) for pair in pairs]
        for result, raw, source in zip(results, rows["row"], rows["source"]):
            result["source"] = source
            result["excerpt"] = _excerpt(raw) if result["reason"] else ""
        return {key: [result[key] for result in results] for key in results[0]}

    def pair(self, raw: RawRow, entry: DatasetEntry) -> Pair | Refused:
        """One row of `entry` as a Pair, or why not."""
        assert entry.formatting is not None, "the formatting is told before rows are encoded"
        try:
            return to_pair(parse_row(raw), entry.formatting, entry.columns, entry.tags, entry.allow_empty_rejected)
        except Refused as refused:
            return refused

    def _accepted(self, pair: Pair, encoded: EncodedPair | Refused) -> dict[str, Any]:
        if isinstance(encoded, Refused):
            return _refused(encoded)
        try:
            fitted, truncated = fit(encoded, self.limits, self.encoder.tokenizer.bos_token_id)
        except Refused as refused:
            return _refused(refused)
        return {
            "prompt_ids": fitted.prompt_ids,
            "chosen_ids": fitted.chosen_ids,
            "rejected_ids": fitted.rejected_ids,
            "prompt_length": len(fitted.prompt_ids),
            "chosen_length": len(fitted.chosen_ids),
            "rejected_length": len(fitted.rejected_ids),
            "digest": pair_digest((fitted.prompt_ids, fitted.chosen_ids, fitted.rejected_ids)),
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "reason": "",
            "detail": "",
            "truncated": truncated,
            "diverged": encoded.diverged,
        }


def _refused(refused: Refused) -> dict[str, Any]:
    return {
        "prompt_ids": [],
        "chosen_ids": [],
        "rejected_ids": [],
        "prompt_length": 0,
        "chosen_length": 0,
        "rejected_length": 0,
        "digest": bytes(DIGEST_BYTES),
        "chosen_score": None,
        "rejected_score": None,
        "reason": refused.reason,
        "detail": refused.detail,
        "truncated": False,
        "diverged": False,
    }


def _excerpt(raw: RawRow) -> str:
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else json.dumps(raw, default=str)
    return text.strip()[:_EXCERPT]
