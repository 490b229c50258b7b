"""Records of CSV files: commas between the fields, double quotes around those that hold commas or line ends."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from dsdpo.data.utf8 import Source, cr_alone, iter_lines, opened
from dsdpo.errors import DataError

_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def iter_csv(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file, with the line that each ends in.

    Raises:
        DataError: the file is not such a CSV file to its end.
    """
    csv.field_size_limit(sys.maxsize)
    with opened(source) as stream:
        lines = _Lines(text for _, _, text in iter_lines(source, stream))
        yield from _records(source, lines)


class _Lines:
    """Lines for csv.reader, of which those of the last record are kept.

    Args:
        lines: of the file.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.kept: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.kept.append(next(self._lines))
        return self.kept[-1]


def _records(source: Source, lines: _Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines, strict=True)
    names = _next(source, reader)
    if names is None:
        raise source.error(1, 0, "the file is empty", "fetch it again, or remove it")
    _check_names(source, names, "".join(lines.kept))
    while True:
        lines.kept.clear()
        row = _next(source, reader)
        if row is None:
            return
        if row == names:
            raise DataError(f"{source.label}:{reader.line_num} names the columns again; keep the first such line alone")
        if any(row[len(names) :]):
            raise DataError(
                f"{source.label}:{reader.line_num} has {len(row)} fields, the first line names {len(names)} columns; "
                "put fields that hold commas or line breaks into double quotes"
            )
        if any(field.lstrip(" \t").startswith('"') and f",{field}" in "".join(lines.kept) for field in row):
            raise DataError(
                f"{source.label}:{reader.line_num} has a space between a comma and a double quote, which makes the "
                "quote a part of the text; take such spaces out, or quote the text and write the quotes in it twice"
            )
        if row:
            yield reader.line_num, dict(itertools.zip_longest(names, row[: len(names)]))


def _next(source: Source, reader: Any) -> list[str] | None:
    """The fields of the next record; None at the end."""
    try:
        found: list[str] | None = next(reader, None)
    except csv.Error as error:
        if "new-line character" in str(error) and reader.line_num <= 1:
            raise source.error(1, 0, *cr_alone(source)) from error
        if "new-line character" in str(error):
            what = f"{source.label}:{reader.line_num}: a CR inside a field"
            raise DataError(f"{what}; put such fields into double quotes, or take it out") from error
        raise DataError(f"{source.label}:{reader.line_num}: not CSV: {error}; write double quotes twice") from error
    return found


def _check_names(source: Source, names: list[str], line: str) -> None:
    """Raise DataError where the first line names no columns between commas."""
    if not names:
        raise source.error(1, 0, "a blank line, where the columns are to be named", "take it out")
    if twice := [name for name in names if names.count(name) > 1]:
        raise source.error(1, 0, f"the column {twice[0]!r} stands twice in the first line", "rename one of them")
    line = line.lstrip('"') if line.lower().startswith('"sep=') else line
    if line.lower().startswith("sep="):
        what = "a line that tells a spreadsheet program the delimiter, where the columns are to be named"
        if line[4:5] != ",":
            raise source.error(1, 0, what, "take it out, and write the file with commas between the fields")
        raise source.error(1, 0, what, f"take it out: tail -n +2 {source.path.name} > records.csv")
    for delimiter, called in _OTHER_DELIMITERS.items():
        if len(next(csv.reader([line], delimiter=delimiter))) > len(names):
            shown = delimiter.replace("\t", "\\t")
            read = f'pandas.read_csv("{source.path.name}", sep="{shown}", dtype=str, keep_default_na=False)'
            command = f"python -c 'import pandas; {read}.to_csv(\"records.csv\", index=False)'"
            raise source.error(1, 0, f"{called} between the fields, and only commas are read", f"convert it: {command}")
    if len(names) > 1 and all(name.startswith(" ") for name in names[1:]):
        raise source.error(1, 0, "spaces after the commas, which belong to the fields", "take them out")
