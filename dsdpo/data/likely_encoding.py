"""Which encoding some bytes are in that are not UTF-8: named only where it is the only one that makes words of them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable


def _share_of(first: str, last: str) -> Callable[[str, bytes], bool]:
    return lambda character, _: first <= character <= last


def _lead(first: int, last: int) -> Callable[[str, bytes], bool]:
    """Whether a two-byte character lies in the rows of an encoding that hold its frequent characters."""
    return lambda _, written: len(written) == 2 and first <= written[0] <= last and written[1] >= 0x40


# encoding as iconv knows it -> Python's codec, and what most characters of its usual text are; narrow ones first
_OF_TWO_BYTES: tuple[tuple[str, str, Callable[[str, bytes], bool]], ...] = (
    ("SHIFT_JIS", "cp932", _share_of("\u3041", "\u30fe")),
    ("EUC-JP", "euc_jp", _share_of("\u3041", "\u30fe")),
    ("EUC-KR", "cp949", lambda character, written: "\uac00" <= character <= "\ud7a3" and written[1] >= 0xA1),
    ("GBK", "gb18030", lambda _, written: len(written) == 2 and 0xB0 <= written[0] <= 0xD7 and written[1] >= 0xA1),
    ("BIG5", "cp950", _lead(0xA4, 0xC6)),
)
_LEADS = 4  # bytes that begin characters: text of the letters of one row, such as Cyrillic ones in GBK, has fewer

_LATIN = "àáâãäåæçèéêëìíîïñòóôõöøùúûüß"
_LATIN += _LATIN[:-1].upper()  # those at the same bytes as in CP1254, ISO-8859-15 and others
_CYRILLIC = "оеаинтр"  # more than half of the letters of a text in Russian
_CYRILLIC_LETTERS = "абвгдежзийклмнопрстуфхцчшщъыьэюяёіїєґ"
_CYRILLIC_LETTERS += _CYRILLIC_LETTERS.upper()
# what punctuation may stand beside; elsewhere it is a letter of another encoding, as in `cos“` for così of a Mac
_PLACES = {
    "\u2019": r"(?<=[A-Za-z])\u2019(?=(?:s|t|re|ve|ll|d|m)\b)|\b(?:[cdjlmnst]|qu)\u2019(?=\w)|(?<=s)\u2019(?!\w)",
    "\u2018": r"(?<!\w)\u2018(?=\w)",
    "“": r"(?<!\w)“(?=\S)",
    "”": r"(?<=\S)”(?!\w)",
    "…": r"(?<=[^\W_])…(?!\w)",
    "\u2013": r"(?<=[\s\d])\u2013(?=[\s\d])",
    "—": r"(?<=\s)—(?=\s)",
    "€": r"(?<=\d)€(?!\w)|(?<=\d )€(?!\w)|(?<!\w)€(?= ?\d)",
    "œ": r"œ(?=u)",
    "Œ": r"\bŒ(?=u)",
    "«": r"(?<!\w)«",
    "»": r"»(?!\w)",
    "¿": r"(?<!\w)¿(?=\w)",
    "¡": r"(?<!\w)¡(?=\w)",
    "°": r"(?<=[\d ])°(?=[CF\W])",
    "№": r"(?<!\w)№",
    "\u00a0": r"(?<!\w)\u00a0|\u00a0(?!\w)",
}
_OF_ONE_BYTE = (("CP1251", "cp1251", _CYRILLIC_LETTERS), ("CP1252", "cp1252", _LATIN))


def guess_encoding(sample: bytes) -> str:
    """The encoding that some bytes are most likely written in, as iconv names it; "" when none is likely."""
    likely = {}
    for name, codec, is_usual in _OF_TWO_BYTES:
        text = _decoded(sample, codec)
        written = [(character, character.encode(codec)) for character in text if character > "\x7f"]
        leads = len({first[0] for _, first in written})
        if len(set(written)) < 2 or leads < min(_LEADS, len(written) / 4):
            continue
        if all(pair[-1] < 0x80 for _, pair in written):  # accents before ASCII letters
            continue
        usual = sum(is_usual(*character) for character in written) / len(written)
        likely[name] = usual * (2 if "JP" in name or name == "SHIFT_JIS" else 1)  # half of Japanese text is kanji
    for name, codec, letters in _OF_ONE_BYTE:
        if _makes_words(_decoded(sample, codec), letters):
            likely[name] = _share_of_runs(sample, are_long=name == "CP1251")
    best = max(likely, key=lambda name: likely[name], default="")
    return best if best and likely[best] >= 0.6 else ""


def _decoded(sample: bytes, codec: str) -> str:
    """The text, or "" where there is none; a character that is cut at the end does not count."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return ""


def _share_of_runs(sample: bytes, are_long: bool) -> float:
    """How many accents stand alone between ASCII letters, or how many letters of another script do not."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    alone = sum(len(run) == 1 for run in runs) / len(runs)
    return 1 - alone if are_long else alone


def _makes_words(text: str, letters: str) -> bool:
    """Whether all that is not ASCII in a text is a usual letter or punctuation, and stands where such can stand."""
    foreign = {character for character in text if character > "\x7f"}
    if not foreign or not foreign <= {*letters, *_PLACES}:
        return False
    for mark in foreign & _PLACES.keys():
        if len(re.findall(_PLACES[mark], text)) < text.count(mark):
            return False
    if re.search(rf"[a-z{letters.lower()}][{letters.upper()}]", text):  # capitals inside of words
        return False
    if letters is _CYRILLIC_LETTERS:  # Greek, Hebrew, Arabic and KOI8 have letters at the same bytes
        found = [character for character in text if character in letters]
        return bool(found) and sum(letter in _CYRILLIC for letter in found) >= 0.45 * len(found)
    return not (
        re.search(r"\b[ÇÈÒÓÔÕËÌÍÎÏÑ]\b", text)  # quotes of a Mac
        or ("õ" in foreign and not foreign & set("ãçä"))  # ő of Hungarian
        or ("û" in foreign and foreign & set("öüõ"))  # ű
        or ("ã" in foreign and "î" in foreign)  # ă of Romanian
    )
