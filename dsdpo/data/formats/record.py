"""Records of all formats -> Example, or Dropped with a reason: columns that every format reads, and what is left over.

The formats themselves stand in `preference` and `replies`. docs/formats.md shows each by example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsdpo.config.stages import Records
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.formats import labelled, preference, replies
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.conversations import Tools
from dsdpo.data.formats.detect import LABELS, READS
from dsdpo.data.formats.names import is_empty
from dsdpo.data.messages import TOOL_KEYS, read_score, read_template_kwargs, read_tools, read_weight, system_and

FORMATS: dict[Records, Mapping[str, Callable[[Columns, Mapping[str, str]], Example]]] = {
    "pairs": preference.FORMATS,
    "replies": replies.FORMATS,
    "labelled": labelled.FORMATS,
    "texts": replies.TEXT_FORMATS,
}


def to_example(
    row: Any,
    formatting: str,
    columns: Mapping[str, str],
    tags: Mapping[str, str],
    allow_empty_rejected: bool,
    ignore_columns: Sequence[str] = (),
    records: Records = "pairs",
) -> Example:
    """One record -> Example, with the checks that hold for every format.

    Args:
        row: the parsed record.
        formatting: a key of FORMATS[records].
        columns, tags, allow_empty_rejected, ignore_columns, records: of the set's entry.

    Raises:
        Dropped: with the reason; columns.NotRead where a column would be lost.
    """
    return read_record(row, formatting, columns, tags, allow_empty_rejected, ignore_columns, records)[0]


def read_record(
    row: Any,
    formatting: str,
    columns: Mapping[str, str],
    tags: Mapping[str, str],
    allow_empty_rejected: bool,
    ignore_columns: Sequence[str] = (),
    records: Records = "pairs",
) -> tuple[Example, Mapping[str, str]]:
    """Like to_example, and which columns were read: name in the record -> our name."""
    if not isinstance(row, dict):
        raise Dropped("not_object", type(row).__name__)
    seen = Columns(row, READS[records][formatting], columns, ignore_columns)
    try:
        example = _with_columns_beside(FORMATS[records][formatting](seen, tags), seen)
    except Dropped as dropped:
        if dropped.code == "column_missing":
            seen.account(None)
        raise
    if notes := seen.account(example):
        example = replace(example, notes=example.notes + notes)
    if records == "replies" and (said := [key for key in LABELS if isinstance(seen.row.get(key), bool)]):
        remedy = f"set stage: kto, take the bad ones out, or set ignore_columns: [{', '.join(said)}]"
        raise Dropped("labelled_answer", f"{', '.join(said)}; {remedy}")
    if records == "pairs":
        return preference.checked(example, allow_empty_rejected), seen.used
    return replies.checked(example), seen.used


def _with_columns_beside(example: Example, row: Columns) -> Example:
    """Add what a record may have beside prompt and answers; text has no place for a system message or tools."""
    is_bare = isinstance(example.prompt, str) or not example.prompt or len(example.prompt[0]) == 2
    if is_bare and row.all_read:
        return example
    if not isinstance(example.prompt, str):
        prompt, own = example.prompt, example.tools
        if not is_bare:
            prompt, own = _with_tools_of_first(prompt, own)
        system = row.optional_text("system")
        if system and is_empty(system):  # CSV files have "[]" and "null"
            system = ""
        tools = read_tools(row.get("tools"))
        kwargs = read_template_kwargs(row.get("chat_template_kwargs"))
        if system or tools or kwargs or prompt is not example.prompt:
            prompt, tools = system_and(system, prompt), _one_of(tools, own)
            example = replace(example, prompt=prompt, tools=tools, template_kwargs=kwargs)
    if "weight" in row.columns:
        example = replace(example, weight=read_weight(row.get("weight")))
    if len(example.completions) != 2 or example.scores != (None, None):
        return example
    scores = tuple(read_score(row.get(key), key) for key in ("chosen_score", "rejected_score"))
    return example if scores == (None, None) else replace(example, scores=scores)


def _with_tools_of_first(prompt: list[Message], tools: Tools) -> tuple[list[Message], Tools]:
    """Tools that stand in the conversation's first message, as some data sets have them, become those of the record."""
    first = prompt[0]
    if all(is_empty(first.get(key)) for key in TOOL_KEYS):
        return prompt, tools
    for key in TOOL_KEYS:
        tools = _one_of(read_tools(first.get(key)), tools)
    return [{key: value for key, value in first.items() if key not in TOOL_KEYS}, *prompt[1:]], tools


def _one_of(tools: Tools, other: Tools) -> Tools:
    if tools and other and tools != other:
        raise Dropped("two_tools", ", ".join(str(tool.get("function", tool))[:40] for tool in (tools[0], other[0])))
    return tools or other
