"""Faults of a data set that end its preparation, whatever max_refused allows, and columns that no record has."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dsdpo.data.dropped import REASONS
from dsdpo.data.encode import RowEncoder, expected_columns
from dsdpo.data.example import Example
from dsdpo.data.readers import iter_rows
from dsdpo.data.registry import INFO_FILE, DatasetEntry
from dsdpo.errors import DataError

LOOKED_AT = 100  # records of a set that are looked at before all are encoded


def check_first_records(rows: RowEncoder, entry: DatasetEntry, max_samples: int | None) -> str | None:
    """Report what likely holds for all records before they are encoded.

    Returns:
        The token that ends the completions, or None where there is no example among them.

    Raises:
        ConfigError: the template does not fit the data.
        DataError: a record has a fatal fault, or there is none.
    """
    end = source = None
    for source, raw in itertools.islice(iter_rows(entry, max_samples), LOOKED_AT):
        example = rows.example(raw, entry)
        if not isinstance(example, Example):
            if REASONS[example.code].fatal:
                raise DataError(f"{source}: {example}")
        else:
            rows.encoder.check_supports(example)
            end = end or rows.encoder.end_token(example)
    if source is None:
        raise DataError(no_records(entry))
    return end


def no_records(entry: DatasetEntry) -> str:
    """What to say of a set without records."""
    files = ", ".join(path.name for path in entry.files[:3]) + (", ..." if len(entry.files) > 3 else "")
    note = "; the first line of a CSV file names its columns and is no record" if ".csv" in files else ""
    return (
        f"{entry.name}{f' ({files})' if files and files != entry.name else ''} holds no record{note}: write it again "
        "with its records, or take its name out of the run"
    )


def check_fatal(batch: pa.RecordBatch) -> None:
    """Raise DataError for the first record with a fatal fault in a batch of pipeline.ENCODED."""
    fatal = pa.array([code for code, reason in REASONS.items() if reason.fatal])
    found = batch.filter(pc.is_in(batch.column("code"), fatal))
    for row in found.slice(0, 1).select(["source", "reason", "detail"]).to_pylist():
        raise DataError(f"{row['source']}: {row['reason']}: {row['detail']}")


def note_missing(entries: Sequence[DatasetEntry], has: Container[str]) -> dict[str, int]:
    """Notes on the columns in ignore_columns that no record has.

    Args:
        entries: as RowEncoder has them.
        has: all values of the column `has` of its results.

    Raises:
        DataError: an optional column that `columns` names is in no record.
    """
    notes = {}
    for number, entry in enumerate(entries):
        for name in expected_columns(entry):
            ignored = name in entry.ignore_columns
            if any(f"{other}:{name}" in has for other in (range(len(entries)) if ignored else [number])):
                continue
            if not ignored:
                keys = ", ".join(f"columns.{key}" for key, value in entry.columns.items() if value == name)
                raise DataError(
                    f"{entry.name}: no record has the column {name} ({keys}); correct its name in {INFO_FILE}, or "
                    "delete the key"
                )
            notes[f"with the column {name}, which ignore_columns names"] = 0
    return notes
