"""JSON that holds records but is none: what it is, and the command that writes its records one in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.detect import is_record
from dsdpo.data.formats.written import is_messages, read_written

_DEEPEST = 4  # keys and lists around the records
_AS_PANDAS = 'to_json("records.jsonl", orient="records", lines=True)'


def shape_of(value: Any, columns: Mapping[str, str], name: str, at: str = ".") -> tuple[str, str] | None:
    """What a value is that is no record itself, and what to do; None where it holds no records that are known.

    Args:
        value: parsed JSON.
        columns: of the set's entry.
        name: of the file.
        at: jq's path to the value.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "an array of records where one record is expected", _by_jq(name, f"{at}[]")
    if not isinstance(value, dict) or not value:
        return None
    if _is_split_table(value):
        return "a table with its columns in one list and its values in another", _by_pandas(name, "split")
    if _is_table(value, columns):
        return "a table by columns, each with a value for every record", _by_pandas(name)
    if is_record(value, columns):
        return None
    for path, record in _inside(value, at, _DEEPEST):
        if is_record(record, columns):
            remedy = _by_jq(name, path)
            if "num_rows_total" in value:
                remedy += "; a hub's viewer gives the first 100, the set's hub id reads all"
            return f"a JSON object that holds the records inside, at {path}", remedy
    return None


def _by_jq(name: str, path: str) -> str:
    return f"write each in its own line: {piped(name, 'jq -c', quoted(path))} > records.jsonl"


def quoted(text: str) -> str:
    """A text as one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


def piped(name: str, command: str, arguments: str = "") -> str:
    """A command that reads a file, which may be compressed."""
    words = f"{command} {arguments}".rstrip()
    return f"gunzip -c {name} | {words}" if name.endswith(".gz") else f"{words} {name}"


def _by_pandas(name: str, orient: str = "columns") -> str:
    read = f'pandas.read_json("{name}", orient="{orient}", dtype=False)'
    return f"write it with {_AS_PANDAS}, as in python -c 'import pandas; {read}.{_AS_PANDAS}'"


def _is_split_table(value: Mapping[str, Any]) -> bool:
    """{"columns": ["prompt", ...], "data": [["Hi", ...], ...]}, which pandas calls split."""
    names, rows = value.get("columns"), value.get("data")
    if not isinstance(names, list) or not isinstance(rows, list):
        return False
    return all(isinstance(row, list) and len(row) == len(names) for row in rows)


def _is_table(value: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """{"prompt": {"0": "Hi", ...}, ...}, as pandas writes by default, or {"prompt": ["Hi", ...], ...}."""
    parts = list(value.values())
    if any(map(_is_conversation, parts)):
        return False
    if all(isinstance(part, dict) and part for part in parts):
        if any(part.keys() != parts[0].keys() for part in parts):
            return False
        first = [next(iter(part.values())) for part in parts]
    elif all(isinstance(part, list) and part and len(part) == len(parts[0]) for part in parts):
        first = [part[0] for part in parts]
        if any(isinstance(item, dict) for item in first):  # messages of one record
            return False
    else:
        return False
    return is_record(dict(zip(value, first)), columns) and not all(isinstance(item, dict) for item in first)


def _is_conversation(value: Any) -> bool:
    """Whether a value is messages of one record, in any form that is read: objects around them, lists of JSON texts."""
    try:
        return is_messages(read_written(value, "a column"))
    except Dropped:
        return True  # the format says what is wrong with them


def _inside(value: Mapping[str, Any], path: str, deepest: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Objects in an object with jq's path to each: first those that lie least deep."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    parts = list(value.items())
    if len(parts) > 1 and all(isinstance(part, dict) for _, part in parts):
        found.append((f"{path}[]", parts[0][1]))  # one record under each key
    for key, part in parts:
        here = f"{path}[{json.dumps(key, ensure_ascii=False)}]"
        if isinstance(part, dict):
            found.append((here, part))
        elif isinstance(part, list) and part and isinstance(part[0], dict):
            found.append((f"{here}[]", part[0]))
    yield from found
    for here, part in found if deepest else ():
        yield from _inside(part, here, deepest - 1)
