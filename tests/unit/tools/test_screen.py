"""Two answers in columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdpo.tools.screen import side_by_side

HEADINGS = ("base", "tuned")


def cells(text: str) -> int:
    return sum(2 if ord(character) > 0x2E80 else 1 for character in text)


def test_columns_under_their_headings() -> None:
    assert side_by_side("one\n  two", "SELECT 1", HEADINGS, 67).splitlines() == [
        "base" + " " * 28 + " | tuned",
        "-" * 32 + "-+-" + "-" * 32,
        "one" + " " * 29 + " | SELECT 1",
        "  two" + " " * 27 + " |",
    ]


def test_a_narrow_terminal_gets_one_below_the_other() -> None:
    assert side_by_side("one two", "three", HEADINGS, 40) == "base\none two\n\ntuned\nthree"


def test_long_lines_break_at_spaces_and_long_words_anywhere() -> None:
    text = "word " * 10 + "x" * 40
    left = [line.split(" |")[0].rstrip() for line in side_by_side(text, "", HEADINGS, 67).splitlines()[2:]]
    assert left == ["word word word word word word", "word word word word", "x" * 32, "x" * 8]


def test_wide_characters_take_two_cells() -> None:
    rows = side_by_side("你好" * 20, "right\n" * 4, HEADINGS, 67).splitlines()[2:]
    assert rows[0].startswith("你好" * 8 + " | right")
    assert {cells(row.split(" |")[0]) for row in rows} == {32}


def test_a_model_cannot_send_codes_to_the_terminal() -> None:
    assert "\033" not in side_by_side("\033[2Jgone", "x", HEADINGS, 80)


def test_headings_are_marked() -> None:
    first = side_by_side("a", "b", HEADINGS, 80, mark=("<", ">")).splitlines()[0]
    assert first.split(" | ")[0].startswith("<base") and first.endswith("<tuned>")


@given(st.text(), st.text(), st.integers(60, 120))
def test_every_word_is_shown_within_the_width(left: str, right: str, width: int) -> None:
    shown = side_by_side(left, right, HEADINGS, width, mark=("", ""))
    column = (width - 3) // 2
    rows = shown.split("\n")[2:]
    expected = ["".join(c for c in side if c.isprintable() and c != " ") for side in (left, right)]
    assert sum(len(row.replace(" ", "")) for row in rows) >= sum(map(len, expected))
    assert all(len(row) <= 2 * column + 3 for row in rows if row.isascii())


@pytest.mark.parametrize("width", [1, 20, 58])
def test_any_width_ends(width: int) -> None:
    assert "你" in side_by_side("你好", "abc def", HEADINGS, width)
