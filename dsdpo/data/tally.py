"""What became of the records, counted batch by batch for the manifest, the summary and the errors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from dsdpo.data.dropped import REASONS

_SHOWN = 5  # reasons in an error
_DETAIL = 160  # characters of a detail in a message


class Tally:
    """Counts over batches of pipeline.ENCODED.

    Args:
        dropped: gets one JSON object in a line for each dropped record.
        sets: how many there are.
    """

    def __init__(self, dropped: IO[str], sets: int) -> None:
        self._n_sets = sets
        self._file = dropped
        self._records = self._rows = 0
        self._dropped: dict[str, dict[str, Any]] = {}  # by reason
        self._flags: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._parts: dict[str, list[int]] = {"prompt": [0, 0, 0]}  # total, longest, number
        self._largest = -1
        self._sets: Counter[int] = Counter()
        self.has: set[str] = set()  # as RowEncoder gives it

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch, and list what it dropped."""
        self._records += pc.sum(batch.column("records")).as_py() or 0
        self._rows += batch.num_rows
        for row in batch.filter(pc.not_equal(batch.column("reason"), "")).select(_LISTED).to_pylist():
            self._add_dropped(row)
        for flag in ("truncated", "diverged"):
            self._flags[flag] += pc.sum(batch.column(flag)).as_py() or 0
        self._notes.update(batch.column("notes").flatten().to_pylist())
        self.has.update(pc.unique(batch.column("has").flatten()).to_pylist())
        kept = batch.filter(pc.equal(batch.column("reason"), ""))
        self._sets.update(kept.column("set").to_pylist())
        self._add_lengths("prompt", kept.column("prompt_length"))
        lengths = kept.column("completion_lengths")
        counts = pc.list_value_length(lengths)
        for number in range(pc.max(counts).as_py() or 0):
            has = pc.greater(counts, number)
            self._add_lengths(f"completion {number + 1}", pc.list_element(lengths.filter(has), number))
        for ids in (kept.column("prompt_ids").flatten(), kept.column("completion_ids").flatten().flatten()):
            self._largest = max(self._largest, pc.max(ids).as_py() or 0 if len(ids) else -1)

    def _add_dropped(self, row: dict[str, Any]) -> None:
        remedy = REASONS[row["code"]].remedy
        self._file.write(json.dumps({**row, "remedy": remedy}) + "\n")
        first = {key: row[key] for key in ("code", "source", "detail")}
        self._dropped.setdefault(row["reason"], {"count": 0, **first, "remedy": remedy})["count"] += 1

    def _add_lengths(self, part: str, lengths: pa.Array) -> None:
        found = self._parts.setdefault(part, [0, 0, 0])
        found[0] += pc.sum(lengths).as_py() or 0
        found[1] = max(found[1], pc.max(lengths).as_py() or 0)
        found[2] += len(lengths)

    def counts(self) -> dict[str, Any]:
        """As the manifest keeps them; what is dropped with the most frequent reason first."""
        dropped = dict(sorted(self._dropped.items(), key=lambda item: -item[1]["count"]))
        n_dropped = sum(reason["count"] for reason in dropped.values())
        return {
            "rows": self._records,
            "examples": self._rows - n_dropped,
            "examples_of_sets": [self._sets[number] for number in range(self._n_sets)],
            "refused": {reason: found["count"] for reason, found in dropped.items()},
            "dropped": dropped,
            "truncated": self._flags["truncated"],
            "diverged": self._flags["diverged"],
            "notes": dict(self._notes.most_common()),
            "mean_tokens": {part: total / max(n, 1) for part, (total, _, n) in self._parts.items()},
            "longest": {part: longest for part, (_, longest, _) in self._parts.items()},
            "largest_token": self._largest,
        }


_LISTED = ["source", "code", "reason", "detail", "excerpt"]


def reason_texts(counts: Mapping[str, Any]) -> list[str]:
    """Each reason for dropped records: how often, the first place with its detail, and what would keep them."""
    if "dropped" not in counts:  # a set of an earlier version
        return [f"{count} x {reason}" for reason, count in counts["refused"].items()]
    texts = []
    for reason, found in counts["dropped"].items():
        detail = found["detail"] if len(found["detail"]) <= _DETAIL else f"{found['detail'][:_DETAIL]}..."
        text = f"{found['count']} x {reason} (first {found['source']}{f': {detail}' if detail else ''})"
        texts.append(f"{text}: {found['remedy']}" if found["remedy"] else text)
    return texts


def too_many(counts: Mapping[str, Any], max_refused: float, listed: str, info_file: str) -> str:
    """What to say when too many records are dropped."""
    n_dropped = sum(counts["refused"].values())
    allowed = f"max_refused allows {max_refused:.2%}" if counts["examples"] else "no record is left"
    texts = reason_texts(counts)
    more = [f"and {len(texts) - _SHOWN} more reasons"] if len(texts) > _SHOWN else []
    return "\n".join(
        [
            f"{n_dropped} of {counts['rows']} records are dropped, {allowed}:",
            *(f"  {text}" for text in texts[:_SHOWN] + more),
            f"Every one is listed in {listed}; do what would keep them, repair the records, correct the entry in "
            f"{info_file}, or raise max_refused",
        ]
    )
