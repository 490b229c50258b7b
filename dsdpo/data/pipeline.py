"""Records -> encoded batches, in order, in worker processes. Only batches on their way are in memory.

All records are written to a file first, so that one that cannot be read is known before hours of tokenizing. Nothing is
memory-mapped here: pages of a map count as resident memory, and batches that are read are given back.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from dsdpo.data.encode import RowEncoder
from dsdpo.data.readers import iter_rows
from dsdpo.data.registry import DatasetEntry
from dsdpo.data.shards import SCHEMA
from dsdpo.errors import DataError

_RAW = pa.schema([pa.field("source", pa.string()), pa.field("set", pa.int32()), pa.field("row", pa.large_binary())])
_BATCH_RECORDS = 256
_BATCH_BYTES = 1 << 24
_WAITING = 2  # batches for each worker that are on their way

# The columns of a shard, and what is counted: code, reason, detail and excerpt are empty for accepted records.
ENCODED = pa.schema(
    [
        *SCHEMA,
        *(pa.field(name, pa.string()) for name in ("code", "reason", "detail", "excerpt")),
        *(pa.field(name, pa.bool_()) for name in ("truncated", "diverged")),
        *(pa.field(name, pa.list_(pa.string())) for name in ("notes", "has")),
        pa.field("prompt_key", pa.uint64()),
        pa.field("records", pa.int64()),
        pa.field("set", pa.int64()),
    ]
)


def encode(rows: RowEncoder, max_samples: int | None, workers: int, path: Path) -> Iterator[pa.RecordBatch]:
    """All records of the encoder's sets, encoded or dropped, in their order: batches of ENCODED.

    Args:
        rows: encodes a batch.
        max_samples: of the run.
        workers: processes.
        path: file for the records.

    Raises:
        DataError: a file cannot be read, or a worker was killed.
        OSError: the records cannot be written.
    """
    batches, records = _store(rows.entries, max_samples, path)
    encoded = _encode_here(rows, path, batches) if workers == 1 else _encode_in_workers(rows, path, batches, workers)
    with frozen(), tqdm(total=records, desc="tokenizing", unit=" records", disable=not sys.stderr.isatty()) as bar:
        for batch in encoded:
            yield batch
            bar.update(pc.sum(batch.column("records")).as_py() or 0)


@contextmanager
def frozen() -> Iterator[None]:
    """Keep what is in memory now out of garbage collections, which would look at all imported modules again and again.

    In forked workers its pages stay shared, too.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _store(entries: list[DatasetEntry], max_samples: int | None, path: Path) -> tuple[int, int]:
    """Write the records, parsed ones as JSON again; the numbers of batches and of records."""
    batches = records = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _RAW) as writer:
        for batch in _raw_batches(entries, max_samples):
            writer.write_batch(batch)
            batches, records = batches + 1, records + batch.num_rows
    return batches, records


def _raw_batches(entries: list[DatasetEntry], max_samples: int | None) -> Iterator[pa.RecordBatch]:
    columns: tuple[list[Any], ...] = ([], [], [])
    size = 0
    for number, entry in enumerate(entries):
        for source, row in iter_rows(entry, max_samples):
            line = row if isinstance(row, bytes) else json.dumps(row).encode()
            for column, value in zip(columns, (source, number, line)):
                column.append(value)
            size += len(line)
            if len(columns[0]) == _BATCH_RECORDS or size > _BATCH_BYTES:
                yield pa.record_batch(list(columns), schema=_RAW)
                columns, size = ([], [], []), 0
    if columns[0]:
        yield pa.record_batch(list(columns), schema=_RAW)


def _encode_batch(rows: RowEncoder, reader: pa.ipc.RecordBatchFileReader, number: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(rows(reader.get_batch(number).to_pydict()), schema=ENCODED)


def _encode_here(rows: RowEncoder, path: Path, batches: int) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(batches):
            yield _encode_batch(rows, reader, number)


_in_worker: tuple[RowEncoder, pa.ipc.RecordBatchFileReader]  # set in a worker process alone


def _start_worker(rows: RowEncoder, path: Path, parent: int) -> None:
    global _in_worker
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _in_worker = rows, pa.ipc.open_file(pa.OSFile(str(path)))


def _end_with(parent: int) -> None:
    """End this worker once its parent was killed: it would wait for the next batch for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(number: int) -> bytes:
    batch: bytes = _encode_batch(*_in_worker, number).serialize().to_pybytes()
    return batch


def _encode_in_workers(rows: RowEncoder, path: Path, batches: int, workers: int) -> Iterator[pa.RecordBatch]:
    """Forked workers read a batch by its number and send it back as Arrow's bytes, which cost this process little."""
    with _one_thread_per_worker():
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), _start_worker, (rows, path, os.getpid())
        )
        waiting: deque[Future[bytes]] = deque()
        numbers = iter(range(batches))
        try:
            waiting.extend(pool.submit(_work, number) for number in islice(numbers, _WAITING * workers))
            while waiting:
                yield pa.ipc.read_record_batch(pa.py_buffer(waiting.popleft().result()), ENCODED)
                waiting.extend(pool.submit(_work, number) for number in islice(numbers, 1))
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenizes was killed, most likely for want of memory; lower preprocessing_num_workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_per_worker() -> Iterator[None]:
    """Forked workers must not start tokenizer threads: they would be workers times cores, and can hang after a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
