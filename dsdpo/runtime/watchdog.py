"""Notices a rank that hangs or is left alone, and ends the others with a name instead of a wait without end.

A thread in each rank renews a small file in output_dir/ranks. Where a rank makes no progress for hang_timeout, it looks
at the others' files: a rank whose thread is silent is dead or stopped, one with fewer beats is behind. It writes the
stacks of its own threads, and ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dsdpo.errors import HangError
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.lock import holder, holder_is_gone, this_process
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, wait_for_exit, write_exit

_LONG_S = 1800.0  # for first steps, saves and evaluations
_FIRST_STEPS = 3
_STOPPED_S = 5.0  # a look that is later than this: the process was stopped in between
_SILENT_BEATS = 4  # missed renewals after which a rank counts as silent


class Watch:
    """Watches over this rank from a thread. Without `limit`, as before the first step, it only looks for orphans.

    Args:
        run_dir: of the run; the ranks share it.
        mesh: this rank's place.
        hang_timeout: seconds without a beat that are allowed, in the steps after the first ones.
        token: of the lock that this run holds: without its holder a rank ends at once. None: there is no lock.
    """

    def __init__(self, run_dir: RunDir, mesh: Mesh, hang_timeout: float, token: str | None) -> None:
        self._run_dir = run_dir
        self._mesh = mesh
        self._hang_timeout = hang_timeout
        self.token = token
        self._parent = os.getppid()
        self._me = this_process()
        self._unheld = 0
        self._every = min(5.0, hang_timeout / 10)
        self._beats = 0
        self._steps: set[int] = set()
        self._beaten = time.monotonic()
        self._limit: float | None = None
        self._where = "before the first step"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin; another process may have left files of other ranks."""
        self._renew()
        self._thread.start()

    def beat(self, step: int) -> None:
        """This rank has done a micro-step of `step`."""
        if len(self._steps) <= _FIRST_STEPS:
            self._steps.add(step)
        self._beaten = time.monotonic()  # before the limit: the thread may look in between
        self._beats += 1
        self._where = f"step {step + 1}"
        self._limit = self._hang_timeout if len(self._steps) > _FIRST_STEPS else max(_LONG_S, self._hang_timeout)

    def goes_on(self) -> None:
        """This rank makes progress with what is `slow`."""
        self._beaten = time.monotonic()

    @contextmanager
    def slow(self, what: str) -> Iterator[None]:
        """Inside, half an hour is allowed, after each sign that it `goes_on` anew."""
        limit, where = self._limit, self._where
        self._limit, self._where = max(_LONG_S, self._hang_timeout), what
        self._beaten = time.monotonic()
        try:
            yield
        finally:
            self._beaten = time.monotonic()
            self._limit, self._where = limit, where

    def close(self) -> None:
        """The run has ended well: nobody is waited for any more."""
        self._closed.set()

    # --- the thread ---

    def _run(self) -> None:
        renewed, missed = time.monotonic(), 0
        while not self._wait():
            if os.getppid() != self._parent:
                os.kill(os.getpid(), signal.SIGKILL)
            if time.monotonic() - renewed >= self._every:
                renewed = time.monotonic()
                if self._is_orphan():
                    os.kill(os.getpid(), signal.SIGKILL)
                with suppress(OSError):  # a file system that is away for a while
                    self._renew()
                missed = missed + 1 if self._neighbour_has_died() else 0
            if missed > 1 and not self._closed.is_set():
                self._end(time.monotonic() - self._beaten)
            limit, waited = self._limit, time.monotonic() - self._beaten
            if limit is not None and waited > limit and not self._closed.is_set():
                self._end(waited)

    def _wait(self) -> bool:
        """Sleep until the next look; whether the run has ended well. While this process was stopped, as a job that the
        scheduler suspends is, it could make no progress: that time does not count."""
        pause, began = min(1.0, self._every), time.monotonic()
        closed = self._closed.wait(pause)
        late = time.monotonic() - began - pause
        if late > _STOPPED_S:
            self._beaten += late
        return closed

    def _is_orphan(self) -> bool:
        """Whether the lock's holder has ended or given it back, or another job has it, and may write to output_dir."""
        with suppress(Exception):
            facts = holder(self._run_dir)
            # A supervisor on another host gives the lock back at its end; once may be a slow file system.
            self._unheld = self._unheld + 1 if facts is None else 0
            if facts and self.token is not None:
                return bool(facts["token"] != self.token or holder_is_gone(facts))
        return self.token is not None and self._unheld > 1

    def _neighbour_has_died(self) -> bool:
        """Whether the next rank, on this host, is gone: NCCL would wait for it, and a launcher for each in turn."""
        if self._mesh.world_size == 1:
            return False
        facts, _ = self._seen((self._mesh.rank + 1) % self._mesh.world_size, 0.0)
        return self._has_died(facts)

    def _has_died(self, facts: dict[str, Any]) -> bool:
        return facts.get("token") == self.token and holder_is_gone(facts)

    def _renew(self) -> None:
        """Write this rank's heartbeat. Not atomic by fsync: nothing depends on it after a crash."""
        path = self._run_dir.heartbeat(self._mesh.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"token": self.token, "beats": self._beats, **self._me}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts))
        os.replace(temporary, path)

    def _end(self, waited: float) -> None:
        """Write this rank's stacks, and if it is the first of those that wait, what happened; then end it."""
        with suppress(OSError):
            self._renew()
        try:
            told, first = self.diagnose(waited)
        except OSError as error:
            told, first = f"rank {self._mesh.rank} cannot see the other ranks: {error}", self._mesh.rank
        with suppress(OSError), self._run_dir.stacks(self._mesh.rank).open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        if self._mesh.rank == first:
            faulthandler.dump_traceback(all_threads=True)
            print(told, file=sys.stderr, flush=True)
            with suppress(Exception):
                write_exit(self._run_dir, ExitRecord(HangError.exit_code, told, self._mesh.rank))
        else:  # whoever ends first cuts the others' connections: let that one say first what happened
            wait_for_exit(self._run_dir)
        os._exit(HangError.exit_code)

    def diagnose(self, waited: float) -> tuple[str, int]:
        """What has happened, and the first rank that is alive and waits.

        Args:
            waited: seconds since this rank's last beat.
        """
        now = self._run_dir.heartbeat(self._mesh.rank).stat().st_mtime
        alive: dict[int, dict[str, Any]] = {}
        silent: list[str] = []
        for rank in range(self._mesh.world_size):
            facts, age = self._seen(rank, now)
            name = f"rank {rank} (host {facts.get('host', '?')}, pid {facts.get('pid', '?')})"
            if self._has_died(facts):
                silent.append(f"{name}, which has died")
            elif facts.get("token") != self.token or age > _SILENT_BEATS * self._every + 1:
                silent.append(f"{name}, without a sign of life for {age:.0f} s")
            else:
                alive[rank] = {**facts, "name": name}
        most = max((facts["beats"] for facts in alive.values()), default=0)
        behind = [facts["name"] for facts in alive.values() if facts["beats"] < most]
        if silent:
            who = f"{'; '.join(silent)}: stopped, dead, or its node is cut off"
        elif behind:
            who = f"{', '.join(behind)} is behind the others"
        else:
            who = f"rank {self._mesh.rank} and all others have come equally far: a collective call hangs"
        return (
            f"{who}. No progress for {waited:.0f} s in {self._where} (hang_timeout is {self._hang_timeout:g} s); the "
            f"stacks of the ranks that wait are in {self._run_dir.ranks}. The same command goes on from the newest "
            "checkpoint"
        ), min(alive, default=self._mesh.rank)

    def _seen(self, rank: int, now: float) -> tuple[dict[str, Any], float]:
        """What a rank's file says, and its age in seconds of the file system's clock."""
        path = self._run_dir.heartbeat(rank)
        try:
            return dict(json.loads(path.read_bytes())), max(0.0, now - path.stat().st_mtime)
        except (OSError, ValueError):
            return {}, float("inf")
