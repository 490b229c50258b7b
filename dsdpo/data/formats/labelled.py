"""Records of answers that are labelled good or bad -> Example with one completion, its label as its score.

The formats are those of single answers with a column for the label; of a dialogue, the last reply is labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example
from dsdpo.data.formats import replies
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.replies import last_reply_alone

_GOOD, _BAD = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")
NOTES = {1.0: "with a desirable answer", 0.0: "with an undesirable answer"}


def _labelled(read: Callable[[Columns, Mapping[str, str]], Example]) -> Callable[[Columns, Mapping[str, str]], Example]:
    def labelled(row: Columns, tags: Mapping[str, str]) -> Example:
        label = _label(row.get("kto_tag"))
        example = last_reply_alone(read(row, tags))
        if replies.LAST_NOT_TRAINED in example.notes:
            raise Dropped("reply_not_trained")
        return replace(example, scores=(label,), notes=(*example.notes, NOTES[label]))

    return labelled


FORMATS = {name: _labelled(replies.FORMATS[name]) for name in ("alpaca", "sharegpt", "openai", "trl")}


def _label(value: Any) -> float:
    if value is None:
        raise Dropped("column_missing", what="label")
    said = str(value).strip().lower()
    if said not in (*_GOOD, *_BAD):
        raise Dropped("bad_label", repr(value)[:60])
    return float(said in _GOOD)
