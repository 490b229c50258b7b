"""How a run is asked to end early, and how it says that it has ended.

A rank never saves inside a signal handler: handlers set a flag, which joins the vector that all ranks reduce each
step, so that all of them leave the loop after the same step.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

from dsdpo.files import write_atomically

STOP_FILE = "STOP"
EXIT_FILE = "EXIT"
STARTED_FILE = "STARTED"
COMPLETED_FILE = "COMPLETED"


class StopFlag:
    """True once this rank received SIGTERM or SIGUSR1, or found output_dir/STOP."""

    def __init__(self, output_dir: Path) -> None:
        self._file = output_dir / STOP_FILE
        self._signalled = False

    def install(self) -> None:
        """Handle the signals that a scheduler sends before it kills."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        return self._signalled or self._file.exists()


def write_exit(output_dir: Path, code: int, message: str) -> None:
    """Tell the supervisor how the run ended; a launcher's own exit code does not."""
    write_atomically(output_dir / EXIT_FILE, json.dumps({"code": code, "message": message}))
