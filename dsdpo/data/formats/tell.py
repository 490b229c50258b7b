"""The format of a set whose entry does not say it, and what to say where it cannot be told."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.data.account import LOOKED_AT, no_records
from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.detect import READS, detect, detect_in_any_case, unread
from dsdpo.data.readers import iter_rows, parse_row
from dsdpo.data.registry import INFO_FILE, DatasetEntry
from dsdpo.errors import DataError

_KINDS = {dict: "an object without a key", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
_HELD = {
    "pairs": "pairs of answers or rankings",
    "replies": "single answers",
    "labelled": "labelled answers",
    "texts": "plain text",
}
# (what the records are, what the stage takes) -> how to take them anyway
_INSTEAD = {
    ("pairs", "replies"): '; to train on the better answers alone, give an entry with columns such as {"response": '
    '"chosen"} and ignore_columns',
}
_SHOWN = {
    "pairs": '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    "replies": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "labelled": '{"prompt": "...", "completion": "...", "label": true}',
    "texts": '{"text": "..."}',
}


def with_formatting(entry: DatasetEntry, config: RunConfig) -> DatasetEntry:
    """The entry with its format, told from the first rows where the entry does not say it. Raises DataError."""
    if entry.formatting is not None:
        return entry
    seen: list[Any] = []
    for _, raw in islice(iter_rows(entry, config.max_samples), LOOKED_AT):
        try:
            row = parse_row(raw)
        except Dropped as dropped:
            row = dropped
        if isinstance(row, dict):
            row = {key: value for key, value in row.items() if key not in entry.ignore_columns}
            if formatting := detect(row, entry.columns, entry.records):
                _check_unread(entry, formatting)
                return replace(entry, formatting=formatting)
            if not entry.columns and (found := detect_in_any_case(row, entry.records)):
                return replace(entry, formatting=found[0], columns=found[1])
        seen.append(row)
    raise DataError(_unknown_format(entry, seen, config.stage))


def _check_unread(entry: DatasetEntry, formatting: str) -> None:
    if left := unread(formatting, entry.columns, entry.records):
        raise DataError(
            f"{entry.name} looks like {formatting}, which does not read columns.{', columns.'.join(left)}; it reads "
            f"{', '.join(READS[entry.records][formatting])}: change columns, or give the formatting in {INFO_FILE}"
        )


def _unknown_format(entry: DatasetEntry, seen: list[Any], stage: str) -> str:
    """What to say of a set whose first records have no format that is known. `seen`: as parsed, or why not."""
    if not seen:
        return no_records(entry)
    for records in reversed(READS):
        if any(isinstance(row, dict) and detect(row, entry.columns, records) for row in seen):
            stages = " or ".join(name for name, spec in STAGES.items() if spec.records == records)
            instead = _INSTEAD.get((records, entry.records), "")
            return f"{entry.name} holds {_HELD[records]}, which stage {stages} takes, not {stage}{instead}"
    keys = sorted({str(key) for row in seen if isinstance(row, dict) for key in row})
    if keys:
        return (
            f"cannot tell the format of {entry.name}: it has the columns {', '.join(keys)}; describe it in {INFO_FILE} "
            f"with formatting ({', '.join(READS[entry.records])}) and columns"
        )
    if isinstance(seen[0], Dropped):
        return f"{entry.name}: the first records cannot be read: {seen[0]}; repair them"
    kind = _KINDS.get(type(seen[0]), "a number")
    return (
        f"{entry.name}: the first record is {kind}; write each as a JSON object that names its values, such as "
        f"{_SHOWN[entry.records]}"
    )
