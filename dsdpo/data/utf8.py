"""Bytes of a file -> lines of strict UTF-8, or one error that says what the file is and where it stops being text."""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import cast

from dsdpo.data.ascii_encodings import ISO_2022, ISO_2022_NAMES, AsciiEncodings
from dsdpo.data.json_decoder import BOM
from dsdpo.data.likely_encoding import guess_encoding
from dsdpo.errors import DataError

_HEAD = 4096  # bytes by which a kind of file is recognized
_SAMPLE = 1 << 16  # bytes by which an encoding is guessed


Line = tuple[int, int, str]  # number, first byte, text


@dataclass(frozen=True)
class Source:
    """A file with its name in messages, such as `pairs.jsonl`."""

    path: Path
    label: str

    def error(self, line: int, byte: int, what: str, remedy: str) -> DataError:
        """What is wrong with the file at a place. `byte` counts from 0, in the unpacked text where it is a .gz file."""
        return DataError(f"{self.label}:{line}, byte {byte}: {what}; {remedy}")


# how files begin that are often met under the name of another kind: bytes, what they are, what to do
_SIGNS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself", "run `git lfs pull` in its repository"),
    (b"\x1f\x8b", "gzip data", "give its name the ending .gz once, or unpack it"),
    (b"PAR1", "a Parquet file", "give its name the ending .parquet"),
    (b"ARROW1", "an Arrow file", "give its name the ending .arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "give its name the ending .arrow"),
    (b"PK\x03\x04", "a zip archive, as Excel workbooks are", "unpack it, or save it as CSV in UTF-8"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save it as CSV in UTF-8"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it with unzstd"),
    (b"\xfd7zXZ", "xz data", "unpack it with unxz"),
    (b"%PDF-", "a PDF document", "name a file of records"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with 7z x"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "lz4 data", "unpack it with unlz4"),
    (b"\x89HDF\r\n", "an HDF5 file", "export its records as JSON lines"),
    (b"\x93NUMPY", "a NumPy file", "export its records as JSON lines"),
    (b"Obj\x01", "an Avro file", "export its records as JSON lines"),
    (b"SQLite format 3", "an SQLite database", "export its records as JSON lines"),
)
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95\}\]cq]")
_HTML = re.compile(rb"(?is)\s*(?:<!--.*?-->\s*)?(?:<\?xml[^>]*>\s*)?<(?:!doctype|html|head|body|script)")
_BOMS = (
    (codecs.BOM_UTF8, ""),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def kind_of_file(head: bytes) -> tuple[str, str] | None:
    """What a file that begins with `head` is, when it is no text of records, and what to do about it."""
    for sign, what, remedy in _SIGNS:
        if head.startswith(sign):
            return what, remedy
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it: tar -xf"
    if _BZIP2.match(head):
        return "bzip2 data", "unpack it with bunzip2"
    if _PICKLE.match(head):
        return "a Python pickle", "save its records as JSON lines"
    if _HTML.match(head.removeprefix(codecs.BOM_UTF8)):
        return (
            "a web page and not the file itself",
            "download the file, on a hub from /resolve/ in place of /blob/",
        )
    return None


def check_head(source: Source, magic: bytes, kind: str) -> None:
    """Raise DataError unless a file begins as its kind does, saying what it is instead."""
    with source.path.open("rb") as stream:
        head = stream.read(_HEAD)
    if not head:
        raise source.error(1, 0, "the file is empty (0 bytes)", "fetch it again, or remove it")
    if not head.startswith(magic):
        what, remedy = kind_of_file(head) or (f"no {kind} data", "correct the ending of its name, or fetch it again")
        raise source.error(1, 0, what, remedy)


@contextmanager
def opened(source: Source) -> Iterator[BufferedReader]:
    """A text file's bytes, unpacked. Raises DataError where its first bytes say that it is something else."""
    is_gzip = source.path.suffix == ".gz"
    if is_gzip:
        check_head(source, b"\x1f\x8b", "gzip")
    with gzip.open(source.path) if is_gzip else source.path.open("rb") as stream:
        buffered = cast(BufferedReader, stream)  # gzip's has the same methods
        _check_text_head(source, buffered.peek(_HEAD))
        yield buffered


def first_character(stream: BufferedReader) -> str:
    """The first character that is no space, or "" where the first block holds none; the stream is not moved."""
    return stream.peek(_HEAD).decode(errors="ignore").removeprefix(BOM).lstrip()[:1]


def iter_lines(source: Source, stream: BufferedReader) -> Iterator[tuple[int, int, str]]:
    """Number (from 1), first byte (from 0) and text of each line, with its newline, without a byte order mark.

    Raises:
        DataError: the file is not UTF-8 text to its end.
    """
    byte, is_ascii, may_be_encoded, encodings = 0, True, True, AsciiEncodings()
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(source, number, byte, line + stream.read(_SAMPLE), error, is_ascii) from None
        _refuse_iso_2022(source, text, number, byte)
        is_ascii = is_ascii and line.isascii()
        may_be_encoded = may_be_encoded and is_ascii and encodings.add(text, number, byte)
        if "\0" in text:
            raise _nul(source, number, byte + line.index(b"\0"))
        yield number, byte, text.removeprefix(BOM)
        byte += len(line)
    if may_be_encoded:
        _check_ascii_encodings(source, encodings)


def iter_pieces(source: Source, stream: BufferedReader, size: int) -> Iterator[str]:
    """The text of a file in pieces of about `size` bytes, for files whose lines may be as long as the file.

    A byte order mark stays in front.

    Raises:
        DataError: as `iter_lines` does.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, byte, is_ascii, may_be_encoded, encodings = 1, 0, True, True, AsciiEncodings()
    while True:
        piece = stream.read(size)
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise _not_utf8(
                source, line, byte - len(pending), error.object + stream.read(_SAMPLE), error, is_ascii
            ) from None
        _refuse_iso_2022(source, text, line, byte)
        is_ascii = is_ascii and piece.isascii()
        if may_be_encoded:  # the end of a piece may cut an escape, and quotes stand outside of them
            may_be_encoded = is_ascii and (byte > 0 or encodings.add(text[: text.rfind('"')], line, byte))
        if "\0" in text:
            at = piece.index(b"\0")
            raise _nul(source, line + piece[:at].count(b"\n"), byte + at)
        if not piece and may_be_encoded:
            _check_ascii_encodings(source, encodings)
        yield text
        if not piece:
            return
        line += piece.count(b"\n")
        byte += len(piece)


def _refuse_iso_2022(source: Source, text: str, line: int, byte: int) -> None:
    if "\x1b$" in text and (found := ISO_2022.search(text)):
        place = line + text.count("\n", 0, found.start()), byte + len(text[: found.start()].encode())
        raise _encoded(source, *place, ISO_2022_NAMES.get("".join(found.groups("")), "ISO-2022-JP"))


def refuse_ascii_encodings(source: Source, lines: Iterable[Line]) -> None:
    """Raise DataError where the first lines of a file, which are no records, are in an encoding of ASCII bytes."""
    found = AsciiEncodings()
    if all(found.add(text, number, byte) for number, byte, text in lines):
        _check_ascii_encodings(source, found)


def _check_ascii_encodings(source: Source, found: AsciiEncodings) -> None:
    """Raise DataError where a file that has been read to its end was in one of them."""
    if likely := found.likely():
        name, place = likely
        raise _encoded(source, *place, name)


def _encoded(source: Source, line: int, byte: int, name: str) -> DataError:
    return source.error(line, byte, f"{name} text, and only UTF-8 is read", _iconv(source, name))


def cr_alone(source: Source) -> tuple[str, str]:
    """What to say of a file whose lines end with CR, and how to convert it."""
    name = source.path.name
    command = f"gunzip -c {name} | tr '\\r' '\\n' | gzip" if name.endswith(".gz") else f"tr '\\r' '\\n' < {name}"
    return "lines that end with CR alone, as old Mac programs write them", f"convert them: {command} > lines.{name}"


def _nul(source: Source, line: int, byte: int) -> DataError:
    return source.error(line, byte, "a NUL byte, which text has none of", "fetch or write the file again")


def _check_text_head(source: Source, head: bytes) -> None:
    if kind := kind_of_file(head):
        raise source.error(1, 0, *kind)
    name = next((name for bom, name in _BOMS if head.startswith(bom)), "") or _by_zero_bytes(head)
    if name:
        raise _encoded(source, 1, 0, name)


def _by_zero_bytes(head: bytes) -> str:
    """UTF-16 and UTF-32 without a byte order mark: where the zero bytes of ASCII characters stand."""
    zeros = [head[start::4].count(0) / max(len(head[start::4]), 1) for start in range(4)]
    high, low = max(zeros), min(zeros)
    if high < 0.2 or low > high / 4:
        return ""
    first, second, third, fourth = (share > high / 2 for share in zeros)
    return {
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
    }.get((first, second, third, fourth), "")


def _iconv(source: Source, encoding: str) -> str:
    name = source.path.name
    if encoding == "HZ":  # few versions of iconv know it
        code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read().decode('hz').encode())"
        return f'convert it: python -c "{code}" < {name} > utf8.{name}'
    if name.endswith(".gz"):
        return f"convert it: gunzip -c {name} | iconv -f {encoding} -t UTF-8 | gzip > utf8.{name}"
    return f"convert it: iconv -f {encoding} -t UTF-8 {name} > utf8.{name}"


def _not_utf8(
    source: Source, line: int, byte: int, sample: bytes, error: UnicodeDecodeError, was_ascii: bool
) -> DataError:
    at = byte + error.start
    if error.reason == "unexpected end of data" and len(sample) == error.end:
        return source.error(line, at, "the file ends within a character", "it was cut off: fetch it again")
    found = f"byte 0x{sample[error.start]:02x} is not UTF-8"
    # a two-byte character of another encoding may pass for UTF-8, three bytes hardly do
    if not was_ascii or any(first >= 0xE0 for first in sample[: error.start]):
        return source.error(line, at, f"{found}, and the text before it is", "repair the damaged place")
    if encoding := guess_encoding(sample):
        return source.error(line, at, f"{found}; the text looks like {encoding}", _iconv(source, encoding))
    remedy = "find the encoding that it was written in and convert it with iconv, or repair the damaged place"
    return source.error(line, at, found, remedy)
