"""Peak resident memory of a run's ranks, by one meter for both sides."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

_EVERY_S = 0.5


class RankMemory:
    """While entered, watches the processes below `root` and keeps each rank's high-water mark.

    A rank is a process with RANK in its environment; where no process has one, `root` itself is the only rank. So
    launchers and supervisors do not count. The kernel keeps the high-water mark (VmHWM), so looking at it now and then
    misses nothing but the last moment of a process.

    Args:
        root: process id of the command that was started.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._peaks: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> RankMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    @property
    def gb(self) -> list[float]:
        """GiB of rank 0, 1, …"""
        ranks = {key: value for key, value in self._peaks.items() if key} or self._peaks
        return [ranks[key] for key in sorted(ranks, key=lambda key: int(key or 0))]

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_S):
            with suppress(psutil.Error):
                root = psutil.Process(self._root)
                self._look(root, "")
                for child in root.children(recursive=True):
                    with suppress(psutil.Error):
                        if rank := child.environ().get("RANK"):
                            self._look(child, rank)

    def _look(self, process: psutil.Process, key: str) -> None:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self._peaks[key] = max(self._peaks.get(key, 0.0), int(line.split()[1]) / 2**20)
