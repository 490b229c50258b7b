"""How a run is asked to end early, and how it says that it has ended.

A rank never saves inside a signal handler: handlers set a flag, which joins the vector that all ranks reduce each
step, so that all of them leave the loop after the same step.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from dsdpo.errors import HangError, IOFailure
from dsdpo.files import write_atomically
from dsdpo.rundir import RunDir

_NOTICED_S = 5.0
_RESERVE_BYTES = 4096


class StopFlag:
    """True once this rank received SIGTERM or SIGUSR1, or found output_dir/STOP, or its time is over.

    Args:
        run_dir: of the run.
        looks: whether this rank looks for the file; one of a run is enough.
        deadline: time.time() at which the run must stop; None: no limit.
    """

    def __init__(self, run_dir: RunDir, looks: bool = True, deadline: float | None = None) -> None:
        self._file = run_dir.stop
        self._looks = looks
        self._deadline = deadline
        self._signalled = False

    def install(self) -> None:
        """Handle the signals that a scheduler sends before it kills. Ctrl-C reaches the ranks of a user's launcher."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._signalled:
            raise KeyboardInterrupt
        self._signalled = True

    def __bool__(self) -> bool:
        is_late = self._deadline is not None and time.time() >= self._deadline
        return self._signalled or is_late or (self._looks and self._is_there())

    def _is_there(self) -> bool:
        try:
            return self._file.exists()
        except OSError:  # a file system that is away for a while: a later step sees it
            return False


def read_exit(path: Path) -> tuple[int | None, str]:
    """Code and message of `write_exit`; None and nothing where there is no such file, or no such content."""
    try:
        said = json.loads(path.read_text())
        return int(said["code"]), str(said["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


def wait_for_exit(run_dir: RunDir, seconds: float = 10.0) -> None:
    """Wait until another rank has said how the run ended, but no longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not run_dir.exit.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def outlive_the_cause() -> None:
    """Wait, before this rank fails, until the launcher has seen any that died before it.

    A rank that is killed cuts the others' connections, and they fail too. The launcher looks once a second and hands on
    the exit code of whichever it looks at first: that of a rank which has only lost its peer would hide the death.
    """
    time.sleep(_NOTICED_S)


def reserve_exit(run_dir: RunDir) -> None:
    """Take the room that `write_exit` needs when the disk is full. Raises IOFailure."""
    write_atomically(run_dir.exit_reserve, " " * _RESERVE_BYTES)


def write_exit(run_dir: RunDir, code: int, message: str) -> None:
    """Tell the supervisor how the run ended; a launcher's own exit code does not.

    That a peer hangs goes before what its loss did to this rank.

    Raises:
        IOFailure: it cannot be written, not even into the room that `reserve_exit` took.
    """
    if code == 1 and read_exit(run_dir.exit)[0] == HangError.exit_code:
        return
    told = json.dumps({"code": code, "message": message})
    reserve = run_dir.exit_reserve
    try:
        write_atomically(run_dir.exit, told)
        reserve.unlink(missing_ok=True)
    except IOFailure:
        if not reserve.exists():
            raise
        short = told if len(told) <= _RESERVE_BYTES else json.dumps({"code": code, "message": message[:500]})
        with reserve.open("r+") as stream:
            stream.write(short.ljust(_RESERVE_BYTES))
        os.replace(reserve, run_dir.exit)
