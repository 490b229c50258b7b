"""Making a prepared set: read, encode in worker processes, count, write.

A set is written into a temporary folder, its manifest last, and renamed: a folder with its final name is whole. Two
processes may prepare the same set at once; the first to rename wins and both use it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from dsdpo.config.schema import RunConfig
from dsdpo.data.account import check_fatal, check_first_records, note_missing
from dsdpo.data.dropped import REASONS, Dropped
from dsdpo.data.encode import Limits, RowEncoder
from dsdpo.data.formats.detect import READS, detect, unread
from dsdpo.data.readers import iter_rows, parse_row
from dsdpo.data.registry import INFO_FILE, DatasetEntry
from dsdpo.data.shards import DROPPED_ROWS, MANIFEST, SCHEMA, write_shards
from dsdpo.data.templates import ExampleEncoder
from dsdpo.errors import DataError
from dsdpo.runtime.files import fsync_path, write_atomically

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_RAW_SCHEMA = pa.schema(
    [pa.field("source", pa.string()), pa.field("set", pa.int32()), pa.field("row", pa.large_binary())]
)
_RAW_ROWS = 1000
_MAP_ROWS = 256
_LOOKED_AT = 100  # rows of a set that may be broken before its format cannot be told
_ABANDONED_S = 2 * 24 * 3600


def make_set(
    config: RunConfig, entries: list[DatasetEntry], tokenizer: PreTrainedTokenizerBase, path: Path, fingerprint: str
) -> None:
    """Write a prepared set.

    Args:
        config: the run.
        entries: the sets, in order.
        tokenizer: of the model.
        path: the set's folder; it appears whole or not at all. Another process may make it at the same time.
        fingerprint: of the set.

    Raises:
        ConfigError: the template does not fit the tokenizer or the data.
        DataError: more than max_refused of the rows are refused, or none is left; the refused rows then stand in
            `<path>.dropped_rows.jsonl`.
        OSError: the file system refused a write.
    """
    encoder = ExampleEncoder(tokenizer, config.template, config.default_system)
    rows = RowEncoder(encoder, [_with_formatting(entry, config) for entry in entries], Limits.of(config))
    for entry in rows.entries:
        check_first_records(rows, entry, config.max_samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    (temporary / "work").mkdir(parents=True)
    try:
        encoded = _encode(rows, config, temporary / "work")
        check_fatal(_tables(encoded))
        missing = note_missing(rows.entries, pc.unique(pc.list_flatten(encoded.data.table.column("has"))).to_pylist())
        counts = _count(encoded)
        counts["notes"] |= missing
        _write_dropped(encoded, temporary / DROPPED_ROWS)
        _check_refused(config, counts, temporary / DROPPED_ROWS, path.with_suffix(".dropped_rows.jsonl"))
        write_shards(_accepted(encoded), temporary)
        del encoded
        shutil.rmtree(temporary / "work")
        described = [f"{entry.name} ({entry.formatting})" for entry in rows.entries]
        manifest = {"fingerprint": fingerprint, "datasets": described, **_settings(config), **counts}
        write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
        _publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _with_formatting(entry: DatasetEntry, config: RunConfig) -> DatasetEntry:
    """The entry with its format, told from the first rows where the entry does not say it."""
    if entry.formatting is not None:
        return entry
    keys: set[str] = set()
    for number, (_, raw) in enumerate(iter_rows(entry, config.max_samples)):
        if number == _LOOKED_AT:
            break
        try:
            row = parse_row(raw)
        except Dropped:
            continue
        if not isinstance(row, dict):
            continue
        row = {key: value for key, value in row.items() if key not in entry.ignore_columns}
        if formatting := detect(row, entry.columns):
            if left := unread(formatting, entry.columns):
                raise DataError(
                    f"{entry.name} looks like {formatting}, which does not read columns.{', columns.'.join(left)}; it "
                    f"reads {', '.join(READS[formatting])}: change columns, or give the formatting in {INFO_FILE}"
                )
            return replace(entry, formatting=formatting)
        keys.update(str(key) for key in row)
    found = f"it has the columns {', '.join(sorted(keys))}" if keys else "it holds no JSON object"
    raise DataError(
        f"cannot tell the format of {entry.name}: {found}; describe it in {INFO_FILE} with formatting "
        f"({', '.join(READS)}) and columns"
    )


def _raw_batches(entries: list[DatasetEntry], max_samples: int | None) -> Iterator[pa.RecordBatch]:
    """Rows in their order, parsed ones as JSON again."""
    columns: tuple[list[Any], ...] = ([], [], [])
    for number, entry in enumerate(entries):
        for source, row in iter_rows(entry, max_samples):
            line = row if isinstance(row, bytes) else json.dumps(row, default=str).encode()
            for column, value in zip(columns, (source, number, line)):
                column.append(value)
            if len(columns[0]) == _RAW_ROWS:
                yield pa.record_batch(list(columns), schema=_RAW_SCHEMA)
                columns = ([], [], [])
    if columns[0]:
        yield pa.record_batch(list(columns), schema=_RAW_SCHEMA)


def _encode(rows: RowEncoder, config: RunConfig, folder: Path) -> Dataset:
    """All rows, encoded or refused, in their order."""
    from datasets import Dataset, Features, List, Value

    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, _RAW_SCHEMA) as writer:
        for batch in _raw_batches(rows.entries, config.max_samples):
            writer.write_batch(batch)
    raw = Dataset.from_file(str(folder / "rows.arrow"))
    if len(raw) == 0:
        raise DataError(f"{', '.join(config.dataset)}: there is no row at all")
    features = Features.from_arrow_schema(SCHEMA)
    features |= {key: Value("string") for key in ("code", "reason", "detail", "excerpt")}
    features |= {key: Value("bool") for key in ("truncated", "diverged")}
    features |= {key: List(Value("string")) for key in ("notes", "has")}
    workers = min(config.preprocessing_num_workers, len(raw))
    with _quiet_unless_terminal(), _one_thread_per_worker(workers):
        return raw.map(
            rows,
            batched=True,
            batch_size=_MAP_ROWS,
            num_proc=workers if workers > 1 else None,
            remove_columns=raw.column_names,
            features=Features(features),
            cache_file_name=str(folder / "encoded.arrow"),
            load_from_cache_file=False,
            new_fingerprint="encoded",
            desc="tokenizing",
        )


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """A progress bar is for a person: a log file gets the summary instead."""
    import datasets

    if sys.stderr.isatty() or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _one_thread_per_worker(workers: int) -> Iterator[None]:
    """Forked workers must not start tokenizer threads: they would be workers times cores, and can hang after a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if workers > 1:
            os.environ.pop("TOKENIZERS_PARALLELISM")
            if before is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = before


def _tables(encoded: Dataset) -> Iterator[pa.RecordBatch]:
    yield from encoded.data.table.to_batches()


def _accepted(encoded: Dataset) -> Iterator[pa.RecordBatch]:
    for batch in _tables(encoded):
        kept = batch.filter(pc.equal(batch.column("reason"), ""))
        yield pa.record_batch([kept.column(name).cast(SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


def _count(encoded: Dataset) -> dict[str, Any]:
    """Records, examples, refusals by reason (the most frequent first), cuts, and token totals by part of an example."""
    table = encoded.data.table
    refused = _counted(table.column("reason"))
    examples = len(table) - sum(refused.values())
    parts = [("prompt", *_totals(table.column("prompt_length"), examples))]
    for number in range(pc.max(pc.list_value_length(table.column("completion_lengths"))).as_py() or 0):
        has = pc.greater(pc.list_value_length(table.column("completion_lengths")), number)
        lengths = pc.list_element(table.column("completion_lengths").filter(has), number)
        parts.append((f"completion {number + 1}", *_totals(lengths, len(lengths))))
    return {
        "rows": len(table),
        "examples": examples,
        "refused": refused,
        "truncated": pc.sum(table.column("truncated")).as_py(),
        "diverged": pc.sum(table.column("diverged")).as_py(),
        "notes": _counted(pc.list_flatten(table.column("notes"))),
        "mean_tokens": {part: total / max(count, 1) for part, total, _, count in parts},
        "longest": {part: longest for part, _, longest, _ in parts},
    }


def _counted(texts: pa.ChunkedArray) -> dict[str, int]:
    """How often each text that is not empty occurs, the most frequent first."""
    found = {item["values"]: item["counts"] for item in pc.value_counts(texts).to_pylist() if item["values"]}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _totals(lengths: pa.ChunkedArray, count: int) -> tuple[int, int, int]:
    return pc.sum(lengths).as_py() or 0, pc.max(lengths).as_py() or 0, count


def _settings(config: RunConfig) -> dict[str, Any]:
    kept = ("model_name_or_path", "template", "default_system", "max_length", "truncation_mode", "max_samples")
    return {"settings": {name: getattr(config, name) for name in kept}}


def _write_dropped(encoded: Dataset, path: Path) -> None:
    with path.open("w") as stream:
        for batch in _tables(encoded):
            refused = batch.filter(pc.not_equal(batch.column("reason"), ""))
            for row in refused.select(["source", "code", "reason", "detail", "excerpt"]).to_pylist():
                stream.write(json.dumps({**row, "remedy": REASONS[row["code"]].remedy}) + "\n")
    fsync_path(path)


def _check_refused(config: RunConfig, counts: dict[str, Any], dropped: Path, keep_at: Path) -> None:
    """Raise DataError when too many rows are refused; their list then stays at `keep_at`."""
    n_refused = counts["rows"] - counts["examples"]
    if counts["examples"] > 0 and n_refused <= config.max_refused * counts["rows"]:
        keep_at.unlink(missing_ok=True)
        return
    os.replace(dropped, keep_at)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(counts["refused"].items())[:5])
    allowed = f"max_refused allows {config.max_refused:.2%}" if counts["examples"] else "no row is left"
    raise DataError(
        f"{n_refused} of {counts['rows']} rows are refused, {allowed}. Reasons: {reasons}. Every one is listed in "
        f"{keep_at}; repair the rows, correct the entry in {INFO_FILE}, or raise max_refused"
    )


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished set its name. Another process that was faster has made the same."""
    fsync_path(temporary)
    try:
        os.rename(temporary, path)
    except OSError:
        if not (path / MANIFEST).exists():
            raise
    fsync_path(path.parent)


def _remove_abandoned(path: Path) -> None:
    """Delete what killed processes left of this set days ago."""
    for folder in path.parent.glob(f".{path.name}.*.tmp"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)
