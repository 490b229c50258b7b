"""Answers on the screen: one model's, or two models' in columns."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from dsdpo.data.messages import Message
from dsdpo.runtime.rundir import RunDir

NARROWEST_COLUMN = 28
_SEPARATOR = " | "


def side_by_side(left: str, right: str, headings: tuple[str, str], width: int, mark: tuple[str, str] = ("", "")) -> str:
    """Two texts in columns under their headings, wrapped to `width` cells; below each other where that is narrow.

    Args:
        mark: what stands before and after a heading, such as a terminal's codes for bold.
    """
    column = (width - len(_SEPARATOR)) // 2
    before, after = mark
    if column < NARROWEST_COLUMN:
        parts = [[f"{before}{head}{after}", *_wrap(text, width)] for head, text in zip(headings, (left, right))]
        return "\n".join([*parts[0], "", *parts[1]])
    heads = [_wrap(head, column) for head in headings]
    rows = [
        f"{before}{_pad(one, column)}{after}{_SEPARATOR}{before}{two}{after}"
        for one, two in zip_longest(*heads, fillvalue="")
    ]
    rows.append("-" * column + "-+-" + "-" * column)
    texts = zip_longest(_wrap(left, column), _wrap(right, column), fillvalue="")
    rows += [f"{_pad(one, column)}{_SEPARATOR}{two}" for one, two in texts]
    return "\n".join(row.rstrip() for row in rows)


def _cells(text: str) -> int:
    """Terminal cells that a text takes: two for a wide (Chinese, say) character, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _cells(text))


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces where there are some. Control characters are left out."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        rest = "".join(c if c.isprintable() else " " * c.isspace() for c in line).rstrip()
        while (fits := _fitting(rest, width)) < len(rest):
            space = rest.rfind(" ", 0, fits + 1)
            cut = space if rest[: max(space, 0)].strip() else fits
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip()
        lines.append(rest)
    return lines


def _fitting(text: str, width: int) -> int:
    """How many of the first characters fit into `width` cells; at least one."""
    used = 0
    for i, character in enumerate(text):
        used += _cells(character)
        if used > width and i > 0:
            return i
    return len(text)


def _heading(name: str) -> str:
    """A folder's name, the run's name for its final/; a hub id as it stands."""
    path = Path(name)
    if not path.is_dir():
        return name
    path = path.resolve()
    return path.parent.name if path == RunDir(path.parent).final else path.name


class Screen:
    """Prints answers for one model or two, bold headings on a terminal."""

    def __init__(self, names: list[str]) -> None:
        short = [_heading(name) for name in names]
        self.headings = short if len(set(short)) == len(short) else names
        plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
        self.mark = ("", "") if plain else ("\033[1m", "\033[0m")

    def prompt(self, number: int, count: int, messages: list[Message]) -> None:
        """A prompt of a file, before its answers."""
        print(f"\n{self.mark[0]}[{number}/{count}]{self.mark[1]} {messages[-1]['content']}\n")

    def answers(self, texts: Sequence[str]) -> None:
        """One answer as it stands, two side by side."""
        if len(texts) == 1:
            print(texts[0], flush=True)
            return
        width = shutil.get_terminal_size().columns
        headings = (self.headings[0], self.headings[1])
        print(side_by_side(texts[0], texts[1], headings, width, self.mark), flush=True)
