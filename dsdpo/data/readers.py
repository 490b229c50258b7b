"""Records of a data set with the place that each came from, streamed. Files are text in UTF-8, Parquet or Arrow."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsdpo.data.csv_files import iter_csv
from dsdpo.data.dropped import Dropped
from dsdpo.data.folders import EntryProblem, check_saved_columns
from dsdpo.data.hub_sets import load_hub
from dsdpo.data.json_decoder import DECODER
from dsdpo.data.json_files import iter_json
from dsdpo.data.registry import DatasetEntry
from dsdpo.data.utf8 import Source, check_head, iter_lines, kind_of_file, opened
from dsdpo.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

# a parsed record, or the JSON text of one that is not parsed yet (workers do that)
RawRow = dict[str, Any] | bytes

_PARQUET_ROWS = 1024
_HUB_ROWS = 1000
_CONTINUES = b"\xff" * 4  # before each message of an Arrow stream


def iter_rows(entry: DatasetEntry, max_samples: int | None = None) -> Iterator[tuple[str, RawRow]]:
    """Every record of a set with its place, such as `pairs.jsonl:17` (lines count from 1; records in other files).

    Raises:
        DataError: a file is not what its name says, or cannot be read to its end, or the hub set cannot be loaded.
    """
    return itertools.islice(_all_rows(entry), entry.row_limit(max_samples))


def parse_row(row: RawRow) -> Any:
    """The record as a JSON value. Raises Dropped for a line that is not JSON."""
    if not isinstance(row, bytes):
        return row
    try:
        return DECODER.decode(row.decode(json.detect_encoding(row), "surrogatepass"))
    except RecursionError as error:
        raise Dropped("not_json", "nested too deeply") from error
    except json.JSONDecodeError as error:
        raise Dropped("not_json", f"{error.msg} at byte {len(error.doc[: error.pos].encode())} of the line") from error
    except ValueError as error:  # such as a number of more digits than Python converts
        raise Dropped("not_json", str(error)) from error


def _all_rows(entry: DatasetEntry) -> Iterator[tuple[str, RawRow]]:
    if entry.hub_id is not None:
        tables = load_hub(entry).with_format("arrow").iter(batch_size=_HUB_ROWS)
        batches = (batch for table in tables for batch in table.to_batches())
        yield from ((f"{entry.hub_id}:{number}", row) for number, row in _table_rows(batches))
        return
    for path in entry.files:
        source = Source(path, entry.label(path))
        if len(entry.files) > 1 and path.stat().st_size == 0:
            continue  # jobs that write many files leave such ones
        try:
            for number, row in _file_rows(source, entry):
                yield f"{source.label}:{number}", row
        except EntryProblem as problem:
            raise DataError(str(problem)) from problem
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}; fetch it again or repair it") from error


def _file_rows(source: Source, entry: DatasetEntry) -> Iterator[tuple[int, RawRow]]:
    name = source.path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return iter_json(source, entry.columns)
    if name.endswith(".csv"):
        return iter_csv(source)
    if name.endswith(".txt"):
        return _text_rows(source)
    return _table_rows(_parquet_batches(source) if name.endswith(".parquet") else _arrow_batches(source))


def _text_rows(source: Source) -> Iterator[tuple[int, RawRow]]:
    with opened(source) as stream:
        for number, _, line in iter_lines(source, stream):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def _table_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, RawRow]]:
    from dsdpo.data.values import records

    yield from enumerate((record for batch in batches for record in records(batch)), 1)


def _parquet_batches(source: Source) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet

    check_head(source, b"PAR1", "Parquet")
    with pyarrow.parquet.ParquetFile(source.path) as file:
        yield from file.iter_batches(_PARQUET_ROWS)


def _arrow_batches(source: Source) -> Iterator[pa.RecordBatch]:
    """Arrow's file format, or the stream format that `datasets` writes. Not mapped: read pages are given back."""
    import pyarrow as pa

    with source.path.open("rb") as start:
        head = start.read(4096)
    if not head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) and (kind := kind_of_file(head)):
        raise source.error(1, 0, *kind)
    with pa.OSFile(str(source.path)) as file:
        if not head.startswith(b"ARROW1"):
            stream = pa.ipc.open_stream(file)
            check_saved_columns(source.path, stream.schema.names)
            yield from stream
            _check_stream_end(source, file)
            return
        reader = pa.ipc.open_file(file)
        check_saved_columns(source.path, reader.schema.names)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _check_stream_end(source: Source, file: pa.OSFile) -> None:
    """Raise DataError unless a stream that has been read ends with its mark: a cut between two batches lacks it."""
    end = file.tell()
    file.seek(0)
    begins = file.read(4)  # streams from before Arrow 0.15 begin and end without it
    file.seek(max(end - 8, 0))
    if begins == _CONTINUES and file.read(8) != _CONTINUES + bytes(4):
        raise DataError(
            f"{source.label}: an Arrow stream without its end, after byte {end}: it was cut off, or its writer did not "
            "close it; copy it again, or write it again"
        )
    if end < file.size():
        raise DataError(
            f"{source.label}: the stream ends at byte {end} of {file.size()}, and what follows it would be lost; "
            "give each stream a file of its own"
        )
