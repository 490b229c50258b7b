"""How a run is asked to end early, and how it says that it has ended.

A rank never saves inside a signal handler: handlers set a flag, which joins the vector that all ranks reduce each
step, so that all of them leave the loop after the same step.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsdpo.errors import HangError, IOFailure
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir

_NOTICED_S = 5.0
_RESERVE_BYTES = 4096
_SHORT = 500  # characters of a message that fit into the reserve
_RANK_IN_MESSAGE = re.compile(r"rank (\d+): ")


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


@dataclass(frozen=True)
class ExitRecord:
    """How a run ended, as one rank saw it. EXIT and EXIT_PEER hold it as JSON.

    Attributes:
        code: exit code.
        message: for the reader.
        rank: which rank wrote it.
    """

    code: int
    message: str
    rank: int

    def to_json(self) -> str:
        """As `read_exit` reads it."""
        return json.dumps(asdict(self))


def read_exit(path: Path) -> ExitRecord | None:
    """The record in EXIT or EXIT_PEER; None where there is no such file, or it holds something else.

    Files of earlier versions have no `rank`: there the message of a rank other than 0 begins with it.
    """
    try:
        found = json.loads(path.read_text())
        record = ExitRecord(int(found["code"]), str(found["message"]), int(found.get("rank", 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    prefix = _RANK_IN_MESSAGE.match(record.message)
    if prefix is None or "rank" in found:
        return record
    return replace(record, message=record.message[prefix.end() :], rank=int(prefix[1]))


def wait_for_exit(run_dir: RunDir, seconds: float = 10.0) -> None:
    """Wait until another rank has said how the run ended, but no longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not run_dir.exit.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def delay_exit() -> None:
    """Wait, before this rank fails, until the launcher has seen any that died before it.

    A rank that is killed cuts the others' connections, and they fail too. The launcher looks once a second and hands on
    the exit code of whichever it looks at first: that of a rank which has only lost its peer would hide the death.
    """
    time.sleep(_NOTICED_S)


def reserve_exit(run_dir: RunDir) -> None:
    """Take the room that `write_exit` needs when the disk is full. Raises IOFailure."""
    write_atomically(run_dir.exit_reserve, " " * _RESERVE_BYTES)


def write_exit(run_dir: RunDir, record: ExitRecord) -> None:
    """Tell the supervisor how the run ended; a launcher's own exit code does not.

    That a peer hangs goes before what its loss did to this rank.

    Raises:
        IOFailure: it cannot be written, not even into the room that `reserve_exit` took.
    """
    earlier = read_exit(run_dir.exit)
    if record.code == 1 and earlier is not None and earlier.code == HangError.exit_code:
        return
    content, reserve = record.to_json(), run_dir.exit_reserve
    try:
        write_atomically(run_dir.exit, content)
        reserve.unlink(missing_ok=True)
    except IOFailure:
        if not reserve.exists():
            raise
        if len(content) > _RESERVE_BYTES:
            content = replace(record, message=record.message[:_SHORT]).to_json()
        with reserve.open("r+") as stream:
            stream.write(content.ljust(_RESERVE_BYTES))
        os.replace(reserve, run_dir.exit)


def write_peer_exit(run_dir: RunDir, record: ExitRecord) -> None:
    """Tell the supervisor what happened to a rank other than 0, such as a full disk; of several the first counts.

    Raises:
        OSError: another rank was first, or it cannot be written.
    """
    with run_dir.peer_exit.open("x") as stream:
        stream.write(record.to_json())
