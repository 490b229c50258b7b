"""JSON as records and their columns hold it: `NaN`, as pandas writes it, is a missing value, and no key is lost."""

from __future__ import annotations

import json
from typing import Any

from dsdpo.data.dropped import Dropped

BOM = "\ufeff"  # also in front of the text of a column, where each was read from a file of its own


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that stands twice with two values would lose one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise Dropped("key_twice", repr(key)[:100])
    return found


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


# json.loads would make one for each record. They raise Dropped for a key that stands twice
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
# takes line ends inside texts, as columns of JSON text hold them
COLUMN_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, strict=False)


def without_bom(text: str) -> str:
    """A text without the byte order marks in front of it, and the spaces around them."""
    return text.lstrip(BOM + " \t\r\n") if BOM in text[:8] and text.lstrip().startswith(BOM) else text
