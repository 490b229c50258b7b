"""How far long work has come, and the time left: a bar on a terminal, a line now and then in a log file.

Only the main rank shows anything, on stderr. What takes a few seconds shows no line in a log file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dsdpo.runtime.env import launched

T = TypeVar("T")

_SHORTEST_S = 5.0  # between two lines, and before the first one
_LONGEST_S = 30.0  # a line is due after this time, however little has been done
_SHARE = 0.1  # a line is due when so much more has been done
_bars = True


def no_bars() -> None:
    """From now on this process writes lines in place of bars, on a terminal too."""
    global _bars
    _bars = False


def format_interval(seconds: float) -> str:
    """`01:30` or `2:01:30`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


class Progress:
    """Counts what is done of some work. A context manager.

    Args:
        what: name of the work, such as `reference`.
        total: number of items.
        unit: name of the items, in the plural.
        scale: items in a unit: 10**6 for bytes that are shown in MB.
        shows: whether this process shows it. None: where it is the main rank, or no rank.
        bar: whether it is a bar. None: on a terminal, unless `no_bars` was called.
        clock: seconds; only differences count.
        write: takes a line.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "",
        scale: int = 1,
        shows: bool | None = None,
        bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._what, self._total, self._scale = what, max(total, 1), scale
        self._unit = f" {unit}" if unit else ""
        self._shows = _is_main() if shows is None else shows
        self._clock, self._write = clock, write or _to_stderr
        self._done = 0
        self._began = self._shown = clock()
        self._shown_done: int | None = None
        self._bar: Any = None
        if self._shows and (_bars and sys.stderr.isatty() if bar is None else bar):
            from tqdm import tqdm

            unit = self._unit or "it"
            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=1 / scale, leave=False, dynamic_ncols=True)

    def advance(self, count: int = 1) -> None:
        """So many more items are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shows and self._done < self._total and self._is_due():
            seconds = self._clock() - self._began
            left = seconds / max(self._done, 1) * (self._total - self._done)
            done, total = self._done // self._scale, self._total // self._scale
            percent = 100 * self._done // self._total
            self._line(f"{done} of {total}{self._unit} ({percent} %), left {format_interval(left)}")

    def _is_due(self) -> bool:
        waited = self._clock() - self._shown
        more = self._done - (self._shown_done or 0) >= _SHARE * self._total
        return waited >= _LONGEST_S or (more and waited >= _SHORTEST_S)

    def _line(self, text: str) -> None:
        self._write(f"{self._what}: {text}")
        self._shown, self._shown_done = self._clock(), self._done

    def close(self) -> None:
        """The work has ended; where lines were written of it, one more says how long it took."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown_done is not None:
            self._line(f"{self._done // self._scale}{self._unit} in {format_interval(self._clock() - self._began)}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._shown_done = None  # work that was broken off has no last line
        self.close()


def track(items: Iterable[T], what: str, total: int, unit: str = "") -> Iterator[T]:
    """The items, counted when the next one is asked for."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def show_library_progress() -> None:
    """Let transformers report loading and saving as `Progress` does, in place of a bar of its own on each rank.

    Download bars of the hub stay where a bar is shown.
    """
    from transformers.utils.logging import disable_progress_bar, set_tqdm_hook

    if not (_is_main() and _bars and sys.stderr.isatty()):
        disable_progress_bar()
    set_tqdm_hook(lambda factory, args, kwargs: _LibraryBar(*args, **kwargs))


class _LibraryBar:
    """As much of a tqdm bar as a library uses."""

    def __init__(self, iterable: Any = None, desc: str | None = None, total: int | None = None, **rest: Any) -> None:
        self._items = iterable
        count = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        shows = False if rest.get("disable") or not count else None
        self._progress = Progress((desc or "loading").lower(), count or 0, shows=shows)

    def __iter__(self) -> Iterator[Any]:
        with self._progress:
            for item in self._items:
                yield item
                self._progress.advance()

    def update(self, count: int = 1) -> None:
        """So many more items are done."""
        self._progress.advance(count)

    def close(self) -> None:
        """The work has ended."""
        self._progress.close()

    def __enter__(self) -> _LibraryBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _is_main() -> bool:
    mesh = launched()
    return mesh is None or mesh.is_main


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
