"""The mismatched answer of each example of stage kto: that of the example before it, behind its own prompt.

It belongs to the prepared example, so the same log-probs of the reference serve every seed and every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from dsdpo.data.encode import shard_row
from dsdpo.data.shards import SCHEMA
from dsdpo.errors import DataError


def with_mismatched(batches: Iterator[pa.RecordBatch], max_length: int) -> Iterator[pa.RecordBatch]:
    """Add to each example, as its second completion, that of the example before it; to the first, that of the second.

    It is cut where the two are longer than max_length.

    Args:
        batches: of SCHEMA, with examples of one completion.

    Raises:
        DataError: there is one example alone.
    """
    first: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    for batch in batches:
        rows = []
        for row in batch.to_pylist():
            if before is None:
                first = before = row
                continue
            if first is not None:
                rows.append(_pair(first, row, max_length))
                first = None
            rows.append(_pair(row, before, max_length))
            before = row
        yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    if first is not None:
        raise DataError(f"{first['source']} is the only example, and stage kto compares each with another: add records")


def _pair(row: dict[str, Any], other: dict[str, Any], max_length: int) -> dict[str, Any]:
    """A row with the completion of another, as far as there is room for it, with the mask that it has there."""
    prompt, room = row["prompt_ids"], max_length - len(row["prompt_ids"])
    ids = [row["completion_ids"][0], other["completion_ids"][0][:room]]
    masks = [some["loss_mask"] and some["loss_mask"][0][:room] for some in (row, other)]
    whole = [[True] * len(some) if mask is None else mask for some, mask in zip(ids, masks)]
    made = shard_row(prompt, ids, [*row["scores"], None], row["weight"], None if masks == [None, None] else whole)
    return {**made, "source": row["source"]}
