"""Values of Arrow and Parquet columns as what JSON can hold, which is what every format reads.

Strings, numbers, booleans, lists and objects stay. Binary values are decoded as UTF-8, dates and times become ISO text,
durations seconds, decimals numbers, maps objects, JSON columns what their text says, and NaN a null. Arrow gives every
object of a column the same keys and fills in nulls, so a null inside an object counts as no key; a null column stays
null. What is no text, such as the bytes of an image, becomes an object that no format takes for text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from dsdpo.data.dropped import NOT_TEXT
from dsdpo.data.json_decoder import BOM

Convert = Callable[[Any], Any]


def records(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch as records. Raises ValueError where a text column is not UTF-8."""
    converts = [_convert(field.type) for field in batch.schema]
    columns = [_values(column, convert) for column, convert in zip(batch.columns, converts)]
    names = batch.schema.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the column {twice[0]!r} is there twice; rename one of them")
    for row in zip(*columns) if columns else [()] * batch.num_rows:
        yield dict(zip(names, row))


def _values(column: pa.Array, convert: Convert | None) -> list[Any]:
    try:
        values = column.to_pylist()
        return values if convert is None else [convert(value) for value in values]
    except (OverflowError, pa.ArrowException):  # times beyond Python's, or in a zone that is not known here
        return [{NOT_TEXT: f"a value of type {column.type}"}] * len(column)


def _convert(kind: pa.DataType) -> Convert | None:
    """How a value of an Arrow type becomes one of JSON; None where it is one already."""
    types = pa.types
    if isinstance(kind, pa.JsonType):
        return _optional(_from_json)
    if isinstance(kind, pa.BaseExtensionType):
        return _optional(str) if isinstance(kind, pa.UuidType) else _convert(kind.storage_type)
    if types.is_struct(kind):
        return _optional(_struct(kind))
    if types.is_map(kind):
        key, item = (_convert(part) or _same for part in (kind.key_type, kind.item_type))
        return _optional(lambda pairs: {str(key(name)): item(value) for name, value in pairs})
    if types.is_run_end_encoded(kind):
        return _convert(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or _is_list_view(kind):
        inner = _convert(kind.value_type)
        return None if inner is None else _optional(lambda values: [inner(value) for value in values])
    if types.is_dictionary(kind):
        return _convert(kind.value_type)
    if types.is_decimal(kind):
        return _optional(float)
    if types.is_temporal(kind):
        return _optional(_time)
    if types.is_floating(kind):
        return _number
    is_plain = types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind)
    if is_plain or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return None
    return _optional(_text_or_mark)


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _time(value: Any) -> Any:
    if hasattr(value, "total_seconds"):
        return value.total_seconds()
    return value.isoformat() if hasattr(value, "isoformat") else list(value)  # months, days and nanoseconds


def _struct(kind: pa.StructType) -> Convert:
    inner = {field.name: _convert(field.type) or _same for field in kind}
    return lambda value: {name: inner[name](part) for name, part in value.items() if part is not None}


def _optional(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _same(value: Any) -> Any:
    return value


def _number(value: float | None) -> float | None:
    return None if value != value else value


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _text_or_mark(value: Any) -> Any:
    if not isinstance(value, bytes):
        return {NOT_TEXT: f"a value of type {type(value).__name__}"}
    try:
        return value.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        return {NOT_TEXT: f"{len(value)} bytes that are not UTF-8, from byte {error.start} on"}
