"""Rows of a data set with the place that each came from, streamed."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.registry import DatasetEntry
from dsdpo.errors import DataError

# a parsed row, or a line of JSON that is not parsed yet (workers do that)
RawRow = dict[str, Any] | bytes

_PARQUET_ROWS = 1024


def iter_rows(entry: DatasetEntry, max_samples: int | None = None) -> Iterator[tuple[str, RawRow]]:
    """Every row of a set with its place, such as `pairs.jsonl:17` (lines count from 1; rows in other kinds of files).

    Raises:
        DataError: a file cannot be read to its end, or the hub set cannot be loaded.
    """
    return itertools.islice(_all_rows(entry), entry.row_limit(max_samples))


def parse_row(row: RawRow) -> Any:
    """The row as a JSON value. Raises Dropped for a line that is not JSON."""
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row)
    except RecursionError as error:
        raise Dropped("not_json", "nested too deeply") from error
    except ValueError as error:
        raise Dropped("not_json", str(error)) from error


def _all_rows(entry: DatasetEntry) -> Iterator[tuple[str, RawRow]]:
    if entry.hub_id is not None:
        for number, row in enumerate(load_hub(entry), 1):
            yield f"{entry.hub_id}:{number}", row
        return
    for path in entry.files:
        label = entry.label(path)
        try:
            for number, row in _file_rows(path):
                yield f"{label}:{number}", row
        except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
            raise DataError(f"{path} cannot be read: {error}; fetch it again or repair it") from error


def load_hub(entry: DatasetEntry) -> Any:
    """The hub set as a `datasets.Dataset`. Raises DataError."""
    try:
        if entry.modelscope:
            from modelscope.msdatasets import MsDataset

            return MsDataset.load(entry.hub_id, subset_name=entry.subset, split=entry.split).to_hf_dataset()
        from datasets import load_dataset

        return load_dataset(entry.hub_id, name=entry.subset, data_dir=entry.folder, split=entry.split)
    except Exception as error:
        raise DataError(
            f"{entry.hub_id} cannot be loaded from the hub: {error}; check its name, subset, split and the network"
        ) from error


def _file_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return _json_rows(path, is_array=name.endswith(".json") and _first_byte(path) == b"[")
    if name.endswith(".csv"):
        return _csv_rows(path)
    return _parquet_rows(path) if name.endswith(".parquet") else _arrow_rows(path)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _first_byte(path: Path) -> bytes:
    """The first byte that is neither space nor part of a byte order mark."""
    with _open(path) as stream:
        while (byte := stream.read(1)) and (byte.isspace() or byte in b"\xef\xbb\xbf"):
            pass
        return byte


def _json_rows(path: Path, is_array: bool) -> Iterator[tuple[int, RawRow]]:
    """Lines of JSON, unparsed; or the items of one array, which is read whole."""
    with _open(path) as stream:
        if is_array:
            yield from enumerate(json.loads(stream.read()), 1)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line


def _csv_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
        for row in reader:
            yield reader.line_num, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(path).iter_batches(_PARQUET_ROWS)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _arrow_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    """Arrow's file format, or the stream format that `datasets` writes."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
