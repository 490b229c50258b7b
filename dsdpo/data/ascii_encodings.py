"""Encodings whose bytes are all ASCII, and so are valid UTF-8: ISO-2022, HZ and UTF-7.

ISO-2022 has escapes that no text holds. For the others a file must be ASCII to its end, each of its `~` or `+` must be
one of the encoding, and what they say must be letters of one script: `~{`, `+1-` and `C++` are text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import NamedTuple

ISO_2022 = re.compile(r"\x1b\$(?:[@AB]|([()])([@-GIPQ]))")  # how such text takes up a set of two-byte characters
ISO_2022_NAMES = {")C": "ISO-2022-KR", ")A": "ISO-2022-CN", ")G": "ISO-2022-CN"}
_HZ = re.compile(r"~(?:~|\n|\r\n|\{((?:[\x21-\x77][\x21-\x7e])+)~\})")
_UTF7 = re.compile(r"\+(?:-|([A-Za-z0-9+/]+)-?)")
_LEAST_WORDS = 2  # escapes
_LEAST_LETTERS = {"LATIN": 3}  # of other scripts 8: "+foo" says one such letter
_USUAL_HANZI = 0xD8  # the rows of GB 2312 before it hold the 3,755 most frequent characters


class Place(NamedTuple):
    """Where the first escape stands."""

    line: int
    byte: int


class AsciiEncodings:
    """Looks for HZ and UTF-7 in the lines of a file, which are given one after another."""

    def __init__(self) -> None:
        self._found: dict[str, _Evidence] = {"HZ": _Evidence(_HZ, "~"), "UTF-7": _Evidence(_UTF7, "+")}

    def add(self, text: str, line: int, byte: int) -> bool:
        """Look at the next ASCII text, whose first byte is `byte` of the file. False: it is in none of them."""
        for name, evidence in list(self._found.items()):
            if evidence.mark in text and not evidence.add(text, line, byte):
                del self._found[name]
        return bool(self._found)

    def likely(self) -> tuple[str, Place] | None:
        """The encoding that the whole file is most certainly in, as iconv names it, and where it is first seen."""
        for name, evidence in self._found.items():
            if evidence.place is not None and evidence.is_certain():
                return name, evidence.place
        return None


class _Evidence:
    """What speaks for one encoding.

    Args:
        pattern: all that may begin with the mark; its group is what is encoded.
        mark: the character that begins an escape.
    """

    def __init__(self, pattern: re.Pattern[str], mark: str) -> None:
        self._pattern, self.mark = pattern, mark
        self.place: Place | None = None
        self._words: set[str] = set()
        self._scripts: Counter[str] = Counter()

    def add(self, text: str, line: int, byte: int) -> bool:
        """Count the escapes of a text. False: it holds one that the encoding has not."""
        at = text.find(self.mark)
        while at >= 0:
            found = self._pattern.match(text, at)
            if found is None:
                return False
            if (escaped := found[1]) is not None:
                word = _decoded(found[0], self.mark)
                if not word:
                    return False
                self.place = self.place or Place(line + text.count("\n", 0, at), byte + at)
                if len(self._words) < 1000:
                    self._words.add(escaped)
                self._scripts.update(map(_script, word))
            at = text.find(self.mark, found.end())
        return True

    def is_certain(self) -> bool:
        """Whether the escapes say words of one script."""
        self._scripts.pop("", None)  # punctuation, and ASCII that an encoder may escape as well
        if not self._scripts or len(self._words) < _LEAST_WORDS:
            return False
        [(script, letters)] = self._scripts.most_common(1)
        return letters >= max(_LEAST_LETTERS.get(script, 8), 0.9 * sum(self._scripts.values())) and script != "other"


def _decoded(escape: str, mark: str) -> str:
    """What an escape says, or "" where it says nothing."""
    try:
        if mark == "~":
            return escape.encode().decode("hz")
        return f"{escape.removesuffix('-')}-".encode().decode("utf-7")
    except UnicodeDecodeError:
        return ""


def _script(character: str) -> str:
    """The script of a letter, `other` for one that is not in use; "" for what is no letter."""
    if character.isascii() or not character.isalpha():
        return ""
    script = unicodedata.name(character, "other").split()[0]
    if script in ("CJK", "HIRAGANA", "KATAKANA"):
        try:
            written = character.encode("gb2312")
        except UnicodeEncodeError:
            return "KANJI"
        return "CJK" if written[0] < _USUAL_HANZI else "KANJI"
    return script
