"""Records of JSON files, as lines or as one array; the text of each is passed on and parsed by the workers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from io import BufferedReader
from itertools import chain
from typing import Any

from dsdpo.data.formats.detect import is_record
from dsdpo.data.json_shapes import piped, quoted, shape_of
from dsdpo.data.utf8 import (
    Line,
    Source,
    cr_alone,
    first_character,
    iter_lines,
    iter_pieces,
    opened,
    refuse_ascii_encodings,
)
from dsdpo.errors import DataError

_TRIED_LINES = 10  # when none of a file's first lines is JSON, the file is at fault and not its records
_WHOLE_OBJECT = 1 << 20  # characters in which an object over several lines is looked for
_PIECE = 1 << 20  # bytes of an array that are read at a time
_NEAR_END = 16  # an error this close to the end of what was read may only mean that more is to come
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[\s\ufeff]*")
_WRAPPER = re.compile(r'\s*\{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[\w.]+)\s*,\s*)*"([^"]+)"\s*:\s*\[\s*(?=\{)')


def iter_json(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[int, bytes]]:
    """Records of a .json or .jsonl file as JSON text, with the line of each, or its number in the array.

    Args:
        source: the file.
        columns: of the set's entry.

    Raises:
        DataError: the file as a whole is not what its name says.
    """
    with opened(source) as stream:
        if first_character(stream) != "[":
            yield from _iter_json_lines(source, stream, columns)
        elif ".jsonl" not in source.path.suffixes:
            yield from _ArrayReader(source, stream).items(columns)
        else:
            raise _array_in_lines(source, stream)


def _array_in_lines(source: Source, stream: BufferedReader) -> DataError:
    """What to say of a .jsonl file that begins with an array."""
    lines = (line for line in iter_lines(source, stream) if line[2].strip())
    number, byte, text = next(lines)
    name = source.path.name
    remedy = f"write one in each line: {piped(name, 'jq -c', quoted('.[]'))} > records.jsonl"
    what = "a JSON array, where a .jsonl file has one object in each line"
    if isinstance(values := _first_value(text, len(text) - len(text.lstrip())), list):
        if values and not isinstance(values[0], dict):
            remedy = 'write each record as an object that names its values: {"prompt": ..., "answer": ...}'
        if next(lines, None) is not None:  # and so in each line
            return source.error(number, byte, what, remedy)
    renamed = f", or give it the name {name.replace('.jsonl', '.json')}, under which one array is read"
    return source.error(number, byte, what, remedy + renamed)


def _iter_json_lines(source: Source, stream: BufferedReader, columns: Mapping[str, str]) -> Iterator[tuple[int, bytes]]:
    """One record in each line that is not blank. The first lines are parsed, to tell what the file really is."""
    lines = (line for line in iter_lines(source, stream) if line[2].strip())
    tried = [line for _, line in zip(range(_TRIED_LINES), lines)]
    if not tried:
        raise source.error(1, 0, "the file is empty", "fetch it again, or remove it")
    if (error := _parse_error(tried[0][2])) is None:
        _refuse_shape(source, tried[0], json.loads(tried[0][2]), columns)
    else:
        length = 0
        for line in lines:
            tried.append(line)
            length += len(line[2])
            if length > _WHOLE_OBJECT:
                break
        fault = _several_lines(source, tried, columns)
        if fault or all(_parse_error(line[2]) for line in tried[:_TRIED_LINES]):
            refuse_ascii_encodings(source, tried)
            raise fault or _not_json(source, tried[0], error)
    for number, _, text in chain(tried, lines):
        yield number, text.encode()


def _parse_error(text: str) -> Exception | None:
    """Why a line is no JSON object, if it is none."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return error
    return None


def _refuse_shape(source: Source, line: Line, value: Any, columns: Mapping[str, str], at: str = ".") -> None:
    """Raise DataError for a value that is no record, and holds records that are known."""
    if shape := shape_of(value, columns, source.path.name, at):
        raise source.error(line[0], line[1], *shape)


def _several_lines(source: Source, lines: list[Line], columns: Mapping[str, str]) -> DataError | None:
    """The fault of a file whose first line begins an object that a later line ends."""
    whole = "".join(line[2] for line in lines)
    number, byte, text = lines[0]
    start = len(whole) - len(whole.lstrip())
    try:
        value, end = _DECODER.raw_decode(whole, start)
    except json.JSONDecodeError as error:
        found = _WRAPPER.match(whole)
        if found and isinstance(item := _first_value(whole, found.end()), dict) and is_record(item, columns):
            _refuse_shape(source, lines[0], {found[1]: [item]}, columns)
        if not (len(whole) >= _WHOLE_OBJECT // 2 and whole.startswith("{", start) and _may_go_on(error, whole)):
            return None
        value, end = None, len(whole)
    except (ValueError, RecursionError):  # such as a number of more digits than Python converts
        return None
    if end <= len(text.rstrip()):
        return None
    _refuse_shape(source, lines[0], value, columns)
    what = "a JSON object over several lines, where each line is to be one record"
    remedy = f"write one in each line: {piped(source.path.name, 'jq -c .')} > lines.jsonl"
    return source.error(number, byte, what, remedy)


def _first_value(text: str, start: int) -> Any:
    try:
        return _DECODER.raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def _not_json(source: Source, line: Line, error: Exception) -> DataError:
    number, byte, text = line
    if not isinstance(error, json.JSONDecodeError):
        if isinstance(error, RecursionError):
            return source.error(number, byte, "JSON that is nested too deeply", "write flatter records")
        return source.error(number, byte, f"not JSON: {error}", "write such numbers as text")
    byte += len(text[: error.pos].encode())
    if text.lstrip().startswith(("{'", '{"')) and error.msg == "Extra data":
        if text[error.pos :].strip() == ",":
            return source.error(number, byte, "a comma after the record", "take it out: each line is one record")
        if text[: error.pos].rstrip(" \t").endswith("\r"):
            return source.error(number, byte, *cr_alone(source))
        return source.error(number, byte, "a second JSON value in the same line", "write one record in each line")
    remedy = "write each record as a JSON object in its own line"
    if text.lstrip().startswith("{'"):
        remedy = "this is how Python prints a dict: write it with json.dumps"
    return source.error(number, byte, f"not JSON: {error.msg}", remedy)


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the error may be due to the end of what has been read."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _NEAR_END


class _ArrayReader:
    """The items of one JSON array, read a piece at a time.

    Args:
        source: the file.
        stream: its bytes.
    """

    def __init__(self, source: Source, stream: BufferedReader) -> None:
        self._source = source
        self._pieces = iter_pieces(source, stream, _PIECE)
        self._text = ""
        self._at = 0
        self._line, self._byte = 1, 0  # of the first character of the text
        self._ended = False

    def items(self, columns: Mapping[str, str]) -> Iterator[tuple[int, bytes]]:
        """Number, from 1, and JSON text of each. Raises DataError for one that holds the records in it."""
        self._next()
        self._at += 1
        is_empty = self._next() == "]"
        number = 0
        while not is_empty:
            number += 1
            place = self._place(self._at) if number == 1 else (0, 0)
            item = self._item()
            if number == 1:
                _refuse_shape(self._source, (*place, item), json.loads(item), columns, ".[]")
            yield number, item.encode()
            mark = self._next()
            if mark == "]":
                break
            if mark != ",":
                raise self._error(self._at, f"no comma after item {number}" if mark else "the array does not end")
            self._at += 1
            self._next()
        self._at += 1
        if self._next() == "[":
            remedy = (
                f"write all records in one: {piped(self._source.path.name, 'jq -c', quoted('.[]'))} > records.jsonl"
            )
            raise self._error(self._at, "a second array after the first", remedy)
        if self._next():
            raise self._error(self._at, "more text after the end of the array")

    def _read(self) -> None:
        """Forget what is behind, and read as much again as is left, or a piece."""
        passed = self._text[: self._at]
        self._line += passed.count("\n")
        self._byte += len(passed.encode())
        parts = [self._text[self._at :]]
        wanted = max(len(parts[0]), 1)
        self._at = 0
        for piece in self._pieces:
            parts.append(piece)
            wanted -= len(piece)
            if wanted <= 0:
                break
        else:
            self._ended = True
        self._text = "".join(parts)

    def _next(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None, "it matches nothing, too"
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read()

    def _item(self) -> str:
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                raise self._error(self._at, "an item that is nested too deeply") from None
            except json.JSONDecodeError as error:
                if self._ended or not _may_go_on(error, self._text):
                    raise self._error(error.pos, error.msg) from None
            else:
                if end < len(self._text) or self._ended:  # a number may go on in the next piece
                    item = self._text[self._at : end]
                    self._at = end
                    return item
            self._read()

    def _place(self, at: int) -> tuple[int, int]:
        """Line and byte of a character of the text."""
        passed = self._text[:at]
        return self._line + passed.count("\n"), self._byte + len(passed.encode())

    def _error(self, at: int, what: str, remedy: str = "") -> DataError:
        remedy = (
            remedy or "repair the file, or fetch it again: one array of objects is read, or one object in each line"
        )
        return self._source.error(*self._place(at), f"not JSON: {what}", remedy)
