"""The entry of dataset_info.json that reads a column which would be lost, found by trying."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.detect import READS, is_structured
from dsdpo.data.formats.names import KEYS_OF, part_of
from dsdpo.data.formats.record import read_record
from dsdpo.data.registry import DatasetEntry

_MOST_TRIED = 4  # columns at once


def remedy(row: Mapping[str, Any], entry: DatasetEntry, names: Sequence[str]) -> str:
    """What reads these columns of a record, or takes them out: an entry to paste, and the option.

    Args:
        row: the record.
        entry: the set's entry, its formatting known.
        names: columns that hold a part of prompt or reply and are not read.
    """
    ignore = f"ignore_columns: {json.dumps(list(names), ensure_ascii=False)}"
    found = next(_readings(row, entry, names), None)
    if found is None:
        return f"no format reads that beside the other columns; to train without, set {ignore}"
    formatting, columns, ignored = found
    described = _described(entry, formatting, columns, [*entry.ignore_columns, *ignored])
    name = _name(entry)
    shown = json.dumps({name: described}, ensure_ascii=False)
    if len(ignored) == len(names):
        return f"no format reads that; to train without, set {ignore}, or use this entry (dataset: {name}): {shown}"
    without = f" (without {', '.join(ignored)}, which no format reads)" if ignored else ""
    return f"this entry of dataset_info.json reads it{without}, with dataset: {name}: {shown}; or set {ignore}"


def _readings(
    row: Mapping[str, Any], entry: DatasetEntry, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """(formatting, columns, columns to ignore) of entries that read the record, with as few ignored as possible."""
    own = entry.formatting or ""
    is_text = not any(is_structured(row, entry.columns, key) for key in ("chosen", "prompt"))
    tried = {**READS, "pairs": ("alpaca", "sharegpt", "trl", "cvalues", "text_to_sql")}
    first = [] if own == "trl" and is_text else [own]  # bare text has no place for more
    formats = list(dict.fromkeys([*first, *tried[entry.records]]))
    for n_ignored in range(0 if len(names) <= _MOST_TRIED else len(names), len(names) + 1):
        for ignored in itertools.combinations(names, n_ignored):
            taken = [name for name in names if name not in ignored]
            for keys in itertools.product(*(_keys(name) for name in taken)):
                for formatting in formats if len(set(keys)) == len(keys) else ():
                    columns = dict(zip(keys, taken))
                    if (used := _used(row, entry, formatting, columns, ignored)) and set(taken) <= used.keys():
                        yield formatting, {key: name for name, key in used.items()}, list(ignored)


def _keys(name: str) -> tuple[str, ...]:
    return KEYS_OF[part_of(name) or "prompt"]


def _used(
    row: Mapping[str, Any], entry: DatasetEntry, formatting: str, columns: Mapping[str, str], ignored: Sequence[str]
) -> Mapping[str, str] | None:
    """The columns that such an entry reads, or None where it does not read the record."""
    reads = READS[entry.records].get(formatting, {})
    if any(key not in reads for key in columns):
        return None
    kept = {key: name for key, name in entry.columns.items() if key in reads and name in row and key not in columns}
    gone = [*entry.ignore_columns, *ignored]
    try:
        read = {**kept, **columns}
        return read_record(row, formatting, read, entry.tags, entry.allow_empty_rejected, gone, entry.records)[1]
    except Dropped:
        return None


def _name(entry: DatasetEntry) -> str:
    """How the entry may be called: as the run names it, or like its file or hub set."""
    if "/" not in entry.name and "." not in entry.name:
        return entry.name
    return re.split("[.@:]", Path(entry.name).name)[0]


def _described(
    entry: DatasetEntry, formatting: str, columns: Mapping[str, str], ignored: Sequence[str]
) -> dict[str, Any]:
    """The entry as dataset_info.json holds it."""
    if entry.hub_id is not None:
        source: dict[str, Any] = {"ms_hub_url" if entry.modelscope else "hf_hub_url": entry.hub_id}
        source |= {"revision": entry.revision} if entry.revision else {}
    else:
        files = [entry.label(path) for path in entry.files]
        source = {"file_name": files[0] if len(files) == 1 else Path(files[0]).parent.as_posix()}
    given = {
        "subset": entry.subset,
        "folder": entry.folder,
        "split": None if entry.split == "train" else entry.split,
        "num_samples": entry.num_samples,
        "tags": dict(entry.tags),
        "allow_empty_rejected": entry.allow_empty_rejected,
        "ignore_columns": list(dict.fromkeys(ignored)),
    }
    kept = {key: value for key, value in given.items() if value}
    ranking = {"ranking": True} if entry.records == "pairs" else {}
    return {**source, "formatting": formatting, **ranking, "columns": dict(columns), **kept}
