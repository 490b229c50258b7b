"""Progress with a clock of the test: when there is a line, what it says, and who writes it."""

from __future__ import annotations

import io
import sys
from itertools import pairwise
from typing import Any

import pytest
from transformers.utils import logging

from dsdpo.runtime import progress
from dsdpo.runtime.progress import Progress, format_interval, show_library_progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Log:
    """Lines with the time at which they were written, by a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[tuple[float, str]] = []

    def progress(self, total: int, **settings: Any) -> Progress:
        return Progress(
            "work", total, "items", bar=False, clock=lambda: self.now, write=self.write, **({"shows": True} | settings)
        )

    def write(self, line: str) -> None:
        self.lines.append((self.now, line))

    def work(self, total: int, seconds_each: float, **settings: Any) -> list[tuple[float, str]]:
        with self.progress(total, **settings) as shown:
            for _ in range(total):
                self.now += seconds_each
                shown.advance()
        return self.lines


@pytest.mark.parametrize(("total", "seconds_each"), [(1000, 0.1), (1000, 1.0), (20, 40.0), (50_000, 0.01)])
def test_lines_come_after_a_tenth_of_the_work_or_half_a_minute(total: int, seconds_each: float) -> None:
    lines = Log().work(total, seconds_each)
    times = [0.0, *(time for time, _ in lines)]
    gaps = [later - earlier for earlier, later in pairwise(times)][:-1]
    assert min(gaps) >= 5.0
    assert max(gaps) <= max(30.0, seconds_each) + seconds_each
    assert len(lines) <= max(11, total * seconds_each / 30 + 1)


def test_a_line_says_what_is_done_and_the_time_left() -> None:
    lines = Log().work(100, 1.0)
    assert lines[0] == (10.0, "work: 10 of 100 items (10 %), left 01:30")
    assert lines[-1] == (100.0, "work: 100 items in 01:40")


def test_bytes_are_shown_in_a_larger_unit() -> None:
    log = Log()
    with log.progress(40_000_000, scale=10**6) as shown:
        for _ in range(4):
            log.now += 6
            shown.advance(10_000_000)
    assert log.lines[0] == (6.0, "work: 10 of 40 items (25 %), left 00:18")
    assert log.lines[-1] == (24.0, "work: 40 items in 00:24")


def test_short_work_writes_nothing() -> None:
    assert Log().work(1000, 0.004) == []


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Log().work(100, 1.0, shows=None) == []
    monkeypatch.setenv("RANK", "0")
    assert Log().work(100, 1.0, shows=None)


def test_work_that_fails_has_no_last_line() -> None:
    log = Log()
    with pytest.raises(ValueError, match="broken"), log.progress(100) as shown:
        for _ in range(20):
            log.now += 1
            shown.advance()
        raise ValueError("broken")
    assert [time for time, _ in log.lines] == [10.0, 20.0]


def test_nothing_to_do_is_no_error() -> None:
    assert Log().work(0, 1.0) == []


def test_a_terminal_gets_a_bar_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_bars", True)
    assert list(track(range(3), "work", 3, "items")) == [0, 1, 2]
    assert "work" in terminal.getvalue() and "/3" in terminal.getvalue()
    progress.no_bars()
    before = terminal.getvalue()
    assert list(track(range(3), "work", 3, "items")) == [0, 1, 2]
    assert terminal.getvalue() == before


def test_bars_of_transformers_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in a log file; on a terminal of the main rank alone."""
    was_on = logging.is_progress_bar_enabled()
    terminal = Terminal()
    try:
        show_library_progress()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(progress, "_bars", True)
        for rank, shown in ((1, False), (0, True)):
            for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}.items():
                monkeypatch.setenv(name, value)
            assert [*logging.tqdm([1, 2], desc="Loading weights")] == [1, 2]
            with logging.tqdm(total=2) as bar:
                bar.set_postfix(a=1)
                bar.update(2)
            assert ("loading weights" in terminal.getvalue()) == shown
    finally:
        logging.set_tqdm_hook(None)
        if was_on:
            logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "00:00"), (59.6, "01:00"), (90, "01:30"), (3600, "1:00:00"), (360061, "100:01:01")]
)
def test_intervals(seconds: float, text: str) -> None:
    assert format_interval(seconds) == text
