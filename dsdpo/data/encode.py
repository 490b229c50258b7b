"""Raw rows -> rows of a shard: format, template, tokens, truncation. Runs in the worker processes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import DIGEST_BYTES, Example, TokenizedExample, example_digest
from dsdpo.data.formats.columns import NotRead
from dsdpo.data.formats.detect import READS
from dsdpo.data.formats.record import to_example
from dsdpo.data.formats.replies import last_reply_alone
from dsdpo.data.formats.suggest import remedy
from dsdpo.data.readers import RawRow, parse_row
from dsdpo.data.registry import DatasetEntry
from dsdpo.data.split import prompt_key
from dsdpo.data.templates import EncodedExample, ExampleEncoder, has_equal

_EXCERPT = 200  # characters of a dropped record that are shown
_PROMPT_SHARE = 8  # of max_length, keep_end leaves at least one part in so many to the prompt
CUT_BOTH = "with a completion cut at its end, too"


@dataclass(frozen=True)
class Limits:
    """What an example may measure, in tokens.

    Attributes:
        max_length: prompt + completion.
        truncation_mode: as in RunConfig.
        row_tokens: longest micro-batch, or None when no pair within max_length can exceed it.
        share_prefix: whether the prompt stands once in a micro-batch.
    """

    max_length: int
    truncation_mode: str
    row_tokens: int | None
    share_prefix: bool

    @classmethod
    def of(cls, config: RunConfig) -> Limits:
        """The run's limits. Two sequences of max_length are the most that a pair can fill; several answers may more."""
        is_pair = STAGES[config.stage].records == "pairs"
        can_exceed = config.row_tokens is not None and (config.row_tokens < 2 * config.max_length or not is_pair)
        return cls(
            max_length=config.max_length,
            truncation_mode=config.truncation_mode,
            row_tokens=config.row_tokens if can_exceed else None,
            share_prefix=config.share_prefix if can_exceed else True,
        )


def fit(example: EncodedExample, limits: Limits, bos_id: int | None) -> tuple[EncodedExample, bool]:
    """Cut an example to max_length.

    Args:
        example: the whole example.
        limits: the run's limits.
        bos_id: kept in front when the prompt's oldest tokens go.

    Returns:
        The example that fits, and whether it was cut.

    Raises:
        Dropped: nothing sensible is left, or truncation_mode is `refuse`, or the example exceeds a micro-batch.
    """
    prompt, completions = example.prompt_ids, example.completion_ids
    over = len(prompt) + max(map(len, completions)) - limits.max_length
    notes = example.notes
    if over > 0:
        size = f"{over + limits.max_length} tokens, max_length is {limits.max_length}"
        if limits.truncation_mode == "refuse":
            raise Dropped("too_long", size)
        if limits.truncation_mode == "keep_end":
            prompt = _prompt_end(prompt, over, limits.max_length, bos_id)
        room = limits.max_length - len(prompt)
        if room < 1:
            raise Dropped("prompt_too_long", f"{len(prompt)} tokens, max_length is {limits.max_length}")
        mask = example.loss_mask
        if max(map(len, completions)) > room:
            completions = [ids[:room] for ids in completions]
            mask = mask and [seen[:room] for seen in mask]
            notes = notes if limits.truncation_mode == "keep_start" else (*notes, CUT_BOTH)
        if example.compares and has_equal(completions):
            raise Dropped("same_once_cut", size)
        example = replace(example, prompt_ids=prompt, completion_ids=completions, loss_mask=mask, notes=notes)
    if example.loss_mask is not None and not all(map(any, example.loss_mask)):
        raise Dropped("no_loss", size if over > 0 else "")
    _check_micro_batch(len(prompt), [len(ids) for ids in completions], limits)
    return example, over > 0


def _prompt_end(prompt: list[int], over: int, max_length: int, bos_id: int | None) -> list[int]:
    """The prompt without its oldest tokens: `over` of them, or fewer where too little of the question would be left."""
    kept = [bos_id] if bos_id is not None and prompt[:1] == [bos_id] else []
    least = len(kept) + max(1, max_length // _PROMPT_SHARE)
    dropped = min(over, max(len(prompt) - least, 0))
    return [*kept, *prompt[len(kept) + dropped :]] if dropped else prompt


def _check_micro_batch(prompt: int, completions: list[int], limits: Limits) -> None:
    tokens = (1 if limits.share_prefix else len(completions)) * prompt + sum(completions)
    if limits.row_tokens is not None and tokens > limits.row_tokens:
        detail = f"{tokens} tokens, max_tokens_per_row is {limits.row_tokens}"
        raise Dropped("too_long_for_row", detail)


def chunks(text: EncodedExample, max_length: int) -> list[EncodedExample]:
    """A text in as few chunks of at most max_length tokens as hold it, of nearly the same size.

    Each token is scored once, but for one that nothing stands before: a chunk begins with the last token of the one
    before it, from which its first is predicted.
    """
    [ids] = text.completion_ids
    whole = [*text.prompt_ids, *ids]
    steps = max(len(whole) - 1, 1)  # tokens to predict, but for a first one
    number = math.ceil(steps / (max_length - 1))
    ends = [1 + steps * k // number for k in range(1, number + 1)]
    starts = [0, *(end - 1 for end in ends[:-1])]
    found = []
    for start, end in zip(starts, ends):
        context = 1 if start else len(text.prompt_ids)
        found.append(
            replace(text, prompt_ids=whole[start : start + context], completion_ids=[whole[start + context : end]])
        )
    return found


class RowEncoder:
    """Batches of raw rows -> batches of encoded ones, for `datasets.Dataset.map`.

    Args:
        encoder: tokenizer and template.
        entries: the sets, each with its formatting known.
        limits: in tokens.
        mask_history: whether only the last reply of a dialogue is trained.
        in_chunks: whether texts are cut into chunks of max_length, of which each is an example.
    """

    def __init__(
        self,
        encoder: ExampleEncoder,
        entries: Sequence[DatasetEntry],
        limits: Limits,
        mask_history: bool = False,
        in_chunks: bool = False,
    ) -> None:
        self.mask_history = mask_history
        self.in_chunks = in_chunks
        self.encoder = encoder
        self.entries = list(entries)
        self.limits = limits
        self._remedies: dict[tuple[str, tuple[str, ...]], str] = {}  # (set, columns) -> what reads them

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """
        Args:
            rows: columns `source`, `set` (number of the entry) and `row` (JSON, bytes).

        Returns:
            One or more rows for each record, in the columns of a shard, with `records` (1 in a record's first row),
            `set`, `code`, `reason`, `detail`, `excerpt` (all empty for accepted records), `truncated`, `diverged`,
            `notes`, `prompt_key`, and `has`, which account.note_missing takes.
        """
        read = [self._read(raw, self.entries[number]) for raw, number in zip(rows["row"], rows["set"])]
        examples = [example for example, _ in read]
        encoded = iter(self.encoder.encode([example for example in examples if isinstance(example, Example)]))
        made = [
            self._accepted(example, next(encoded)) if isinstance(example, Example) else [_dropped(example)]
            for example in examples
        ]
        for results, raw, source, number, (_, has) in zip(made, rows["row"], rows["source"], rows["set"], read):
            for place, result in enumerate(results):
                result["source"] = source
                result["records"], result["set"] = int(place == 0), number
                result["has"] = [f"{number}:{name}" for name in has]
                result["excerpt"] = _excerpt(raw) if result["reason"] else ""
                result["detail"] = _writable(result["detail"])
                result["notes"] = [] if place else list(map(_writable, result["notes"]))
        results = [result for some in made for result in some]
        return {key: [result[key] for result in results] for key in results[0]}

    def example(self, raw: RawRow, entry: DatasetEntry) -> Example | Dropped:
        """One record of `entry` as an Example, or why not."""
        return self._read(raw, entry)[0]

    def _read(self, raw: RawRow, entry: DatasetEntry) -> tuple[Example | Dropped, list[str]]:
        """(the example or why not, those of the entry's optional and ignored columns that the record has)."""
        assert entry.formatting is not None, "the formatting is told before rows are encoded"
        has: list[str] = []
        try:
            record = parse_row(raw)
            if isinstance(record, dict):
                has = [name for name in expected_columns(entry) if name in record]
            example = _example(record, entry)
            return last_reply_alone(example) if self.mask_history else example, has
        except NotRead as missed:
            key = (entry.name, missed.names)
            told = self._remedies[key] = self._remedies.get(key) or remedy(record, entry, missed.names)
            return Dropped(missed.code, f"{missed.detail}; {told}"), has
        except Dropped as dropped:
            return dropped, has
        except RecursionError:
            return Dropped("not_json", "nested too deeply"), has

    def _accepted(self, example: Example, encoded: EncodedExample | Dropped) -> list[dict[str, Any]]:
        if isinstance(encoded, Dropped):
            return [_dropped(encoded)]
        if self.in_chunks:
            return [self._row(example, chunk, False) for chunk in chunks(encoded, self.limits.max_length)]
        try:
            return [self._row(example, *fit(encoded, self.limits, self.encoder.tokenizer.bos_token_id))]
        except Dropped as dropped:
            return [_dropped(dropped)]

    def _row(self, example: Example, fitted: EncodedExample, truncated: bool) -> dict[str, Any]:
        n = len(fitted.completion_ids)  # a dialogue may take several
        scores = example.scores if len(example.scores) == n else (None,) * n
        return {
            **shard_row(fitted.prompt_ids, fitted.completion_ids, scores, example.weight, fitted.loss_mask),
            "code": "",
            "reason": "",
            "detail": "",
            "truncated": truncated,
            "diverged": fitted.diverged,
            "notes": [*example.notes, *fitted.notes],
            "prompt_key": prompt_key(example.prompt or example.completions[0]),
        }


def _example(record: Any, entry: DatasetEntry) -> Example:
    assert entry.formatting is not None
    return to_example(
        record,
        entry.formatting,
        entry.columns,
        entry.tags,
        entry.allow_empty_rejected,
        entry.ignore_columns,
        entry.records,
    )


def expected_columns(entry: DatasetEntry) -> list[str]:
    """Columns that an entry names and single records may lack; where all records lack one, the name is wrong."""
    reads = READS[entry.records][entry.formatting or ""]
    return [*(name for key, name in entry.columns.items() if reads[key].optional), *entry.ignore_columns]


def shard_row(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[Sequence[int]],
    scores: Sequence[float | None],
    weight: float = 1.0,
    loss_mask: Sequence[Sequence[bool]] | None = None,
) -> dict[str, Any]:
    """An example in the columns of a shard, but for its source."""
    masks = None if loss_mask is None else tuple(np.asarray(mask, dtype=bool) for mask in loss_mask)
    prompt, *completions = (np.asarray(ids, dtype=np.int64) for ids in (prompt_ids, *completion_ids))
    example = TokenizedExample(prompt, tuple(completions), masks)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "loss_mask": loss_mask,
        "prompt_length": len(prompt_ids),
        "completion_lengths": [len(ids) for ids in completion_ids],
        "loss_tokens": example.loss_tokens,
        "digest": example_digest(prompt, completions, loss_mask),
        "scores": [math.nan if score is None else score for score in scores],
        "weight": weight,
    }


def _dropped(dropped: Dropped) -> dict[str, Any]:
    return {
        "prompt_ids": [],
        "completion_ids": [],
        "loss_mask": None,
        "prompt_length": 0,
        "completion_lengths": [],
        "loss_tokens": [],
        "digest": bytes(DIGEST_BYTES),
        "scores": [],
        "weight": 1.0,
        "code": dropped.code,
        "reason": dropped.reason,
        "detail": dropped.detail,
        "truncated": False,
        "diverged": False,
        "notes": [],
        "prompt_key": 0,
    }


def _writable(text: str) -> str:
    """Text that can be written as UTF-8: names of columns may hold lone surrogates."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _excerpt(raw: RawRow) -> str:
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else json.dumps(raw, default=str)
    return text.strip()[:_EXCERPT]
