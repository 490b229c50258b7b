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
    before: list[int] | None = None
    for batch in batches:
        rows = []
        for row in batch.to_pylist():
            [ids] = row["completion_ids"]
            if before is None:
                first, before = row, ids
                continue
            if first is not None:
                rows.append(_pair(first, ids, max_length))
                first = None
            rows.append(_pair(row, before, max_length))
            before = ids
        yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    if first is not None:
        raise DataError(f"{first['source']} is the only example, and stage kto compares each with another: add records")


def _pair(row: dict[str, Any], other: list[int], max_length: int) -> dict[str, Any]:
    prompt, [own], mask = row["prompt_ids"], row["completion_ids"], row["loss_mask"]
    other = other[: max_length - len(prompt)]
    masks = None if mask is None else [*mask, [True] * len(other)]
    made = shard_row(prompt, [own, other], [*row["scores"], None], row["weight"], masks)
    return {**made, "source": row["source"]}
