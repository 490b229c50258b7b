"""The columns of one record: which a format has read, and what becomes of the others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsdpo.data.dropped import NOT_TEXT, Dropped
from dsdpo.data.example import Example
from dsdpo.data.formats.detect import Column
from dsdpo.data.formats.names import (
    holds_others,
    is_empty,
    is_label,
    leaves,
    may_be_prompt,
    not_used,
    part_of,
    part_within,
)
from dsdpo.data.formats.written import is_messages, read_written
from dsdpo.data.messages import text_of

_LABELS = frozenset(["role", "from", "type"])  # keys of messages whose text is no word of anybody


class NotRead(Dropped):
    """Columns that hold a part of prompt or reply, and that the format does not read.

    Args:
        places: the columns, or the keys within them: `extra_info.question`.

    Attributes:
        names: of the columns.
    """

    def __init__(self, names: Sequence[str], places: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        super().__init__("column_not_read", ", ".join(places or names))


class Columns:
    """A record, seen through what its format reads and the entry's `columns` (our name -> name in the record).

    Args:
        row: the record.
        reads: our name -> where the format looks for it. What is not in it is not read.
        columns: of the entry.
        ignored: names of columns that count as absent.

    Attributes:
        used: name in the record -> our name, of what has been read.
        prompt_is_guessed: no column is the prompt; it is the beginning that both answers share.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        reads: Mapping[str, Column],
        columns: Mapping[str, str],
        ignored: Sequence[str] = (),
    ) -> None:
        self.row = {key: value for key, value in row.items() if key not in ignored} if ignored else row
        if None in self.row:  # csv puts the cells beyond the header there
            self.row = {str(key): value for key, value in self.row.items()}
        self.reads = reads
        self.columns = columns
        self._named = frozenset(columns.values())
        self.used: dict[str, str] = {}
        self.prompt_is_guessed = False

    def get(self, key: str) -> Any:
        """The value under the name that `columns` gives for `key`, else under the first usual name with a value.

        None where there is none, where an optional column is missing, and where the format does not read `key`.

        Raises:
            Dropped: `columns` names a column that the record lacks.
        """
        column = self.reads.get(key)
        if column is None:
            return None
        named = self.columns.get(key)
        if named is not None:
            if named in self.row:
                self.used[named] = key
                return self.row[named]
            if column.optional:
                return None
            raise Dropped("named_column_missing", f"{named} (columns.{key})")
        there = [name for name in column.usual if self.row.get(name) is not None and name not in self._named]
        if not there:
            return None
        name = there[0] if len(there) == 1 else next((n for n in there if not is_empty(self.row[n])), there[0])
        self.used[name] = key
        return self.row[name]

    @property
    def all_read(self) -> bool:
        """Whether no column is left, and the entry names none that could be read once more."""
        return len(self.used) == len(self.row) and not self.columns

    def text(self, key: str) -> str:
        """A column that must be there and be text."""
        value = self.get(key)
        if isinstance(value, str) and value[:1] not in _MAY_OPEN:
            return value
        if value is None:
            raise Dropped("column_missing", what=key)
        return _text(value, key)

    def optional_text(self, key: str) -> str:
        """A text column, "" when it is missing, null, or an empty list or object."""
        value = self.get(key)
        if value is None or value == "":
            return ""
        return "" if not isinstance(value, str) and is_empty(value) else _text(value, key)

    def account(self, example: Example | None) -> tuple[str, ...]:
        """What becomes of the columns that were not read.

        Args:
            example: what the format made of the record; None where it could not, so that nothing counts as read.

        Returns:
            A note for each column that is not used.

        Raises:
            NotRead: some hold a part of prompt or reply, and the example does not say the same.
        """
        if len(self.used) == len(self.row):
            return ()
        unread = [name for name, value in self.row.items() if name not in self.used and not is_empty(value)]
        if not unread:
            return ()
        if example is None:
            unread = [name for name in unread if name not in self._could_be_read()]
        said = _Said(example)
        if self.prompt_is_guessed:
            asks = [name for name in unread if not is_label(name, self.row[name]) and part_of(name) == "prompt"]
            self.prompt_is_guessed = not asks  # what may be the prompt by its name comes before what may be anything
        missed = {name: place for name in unread if (place := self._missed(name, said))}
        if missed:
            raise NotRead(tuple(missed), tuple(missed.values()))
        return tuple(map(not_used, unread))

    def _could_be_read(self) -> set[str]:
        """Names of columns that the format reads, in records that have all that it needs."""
        return {*self.columns.values(), *(name for column in self.reads.values() for name in column.usual)}

    def _missed(self, name: str, said: _Said) -> str | None:
        """Where an unread column holds a part of prompt or reply that the example does not say; None: nowhere."""
        value = self.row[name]
        if part := self._part(name):
            return None if said.contains(part, value) else name
        return _missed_within(name, value, said) if said.is_known and holds_others(name) else None

    def _part(self, name: str) -> str | None:
        """The part of prompt or reply that an unread column holds, or None."""
        value = self.row[name]
        if isinstance(value, (bool, int, float)):
            return None
        part = None if is_label(name, value) else part_of(name)
        could_be = name in self.columns.values() or (self.prompt_is_guessed and may_be_prompt(name, value))
        return "prompt" if part is None and could_be else part


class _Said:
    """The words of an example, without differences of spaces; joined only if a column asks."""

    def __init__(self, example: Example | None) -> None:
        self._example = example
        self._prompt: str | None = None
        self._all = ""
        self.is_known = example is not None

    def contains(self, part: str, value: Any) -> bool:
        """Whether the example says all that a column says: in its prompt, for what can only be part of a prompt."""
        if self._example is None or part in ("media", "tools", "chat_template_kwargs"):
            return False
        if self._prompt is None:
            self._prompt = _joined(self._example.prompt)
            self._all = "\n".join([self._prompt, *map(_joined, self._example.completions)])
        where = self._all if part in ("messages", "history", "reply") else self._prompt
        texts = leaves(_parsed(value), _LABELS)
        return bool(texts) and all(_stands_in(" ".join(text.split()), where) for text in texts)


def _text(value: Any, key: str) -> str:
    """A value that is text, or one message, or parts of a content; also as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] not in _MAY_OPEN:
        return value
    value = read_written(value, key)
    if is_messages(value):
        message = value[0] if isinstance(value, list) else value
        speakers = ("system", "developer") if key == "system" else ("user", "human")
        if len(value) > (1 if isinstance(value, list) else 2) or message.get("role") not in speakers:
            raise Dropped("not_text", "messages", key)
        if message.keys() != {"role", "content"}:
            raise Dropped("not_text", f"a message with {', '.join(message)}", key)
        value = message["content"]
    return text_of(value, key)


_MAY_OPEN = frozenset("[{\"'(a \t\r\n")  # lists and objects in JSON and as Python prints them


def _missed_within(place: str, value: Any, said: _Said) -> str | None:
    """Like Columns._missed, of the keys of objects, which JSON text may hold, too."""
    value = _parsed(value)
    if is_messages(value):
        return None if said.contains("messages", value) else place
    if isinstance(value, list):
        return next((found for inner in value if (found := _missed_within(place, inner, said))), None)
    if not isinstance(value, dict) or NOT_TEXT in value:
        return None
    for key, inner in value.items():
        if isinstance(inner, (bool, int, float)) or is_empty(inner):
            continue
        within = f"{place}.{key}"
        if part := part_within(str(key), inner):
            if not said.contains(part, inner):
                return within
        elif holds_others(str(key)) and (found := _missed_within(within, inner, said)):
            return found
    return None


def _joined(value: Any) -> str:
    return "\n".join(" ".join(text.split()) for text in leaves(value, _LABELS))


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return [_parsed(inner) for inner in value] if isinstance(value, list) else value


def _stands_in(text: str, whole: str) -> bool:
    """Whether a text occurs in another, and not as a piece of a word."""
    if text not in whole:
        return False
    if len(text) > 40:
        return True
    return re.search(rf"(?<![^\W_]){re.escape(text)}(?![^\W_])", whole) is not None or not text.isascii()
