"""The lock of an output_dir, between real processes: refused, released, taken over, raced for."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsdpo.errors import IOFailure
from dsdpo.runtime import lock as module
from dsdpo.runtime.lock import EXPIRED_S, HEARTBEAT_S, RunLock, holder, is_held_by
from dsdpo.runtime.rundir import RunDir

REPOSITORY = Path(__file__).parents[3]

# Answers each line "FOLDER<tab>TIME" by trying for the folder's lock at that time; the next line releases it.
JOB = """
import errno, os, sys, time
from pathlib import Path
from dsdpo.errors import IOFailure
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir

def refuse(*_):
    raise OSError(errno.EPERM, "no links here")

if "no-links" in sys.argv:
    os.link = refuse
lock = None
for line in sys.stdin:
    folder, start = line.split("\\t")
    if lock:
        lock.release()
    lock = None
    time.sleep(max(0, float(start) - time.time()))
    try:
        lock = RunLock.acquire(RunDir(Path(folder)), "dsdpo train")
        print("holds", flush=True)
    except IOFailure as error:
        print(error.exit_code, error, flush=True)
"""
# Takes and releases the lock again and again, and tells when another one was inside at the same time.
CHURN = """
import sys, time
from pathlib import Path
from dsdpo.errors import IOFailure
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir
folder, end, turns = Path(sys.argv[1]), time.time() + 1.5, 0
while time.time() < end:
    try:
        with RunLock.acquire(RunDir(folder / "out"), "dsdpo train"):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            turns += 1
    except IOFailure:
        pass
print(turns)
"""


class Job:
    """Another process that tries for a lock and keeps what it got."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def ask(self, folder: Path, start: float = 0.0) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{folder}\t{start}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def acquire(self, folder: Path) -> str:
        self.ask(folder)
        return self.answer()

    def kill(self, reap: bool = True) -> None:
        self.process.send_signal(signal.SIGKILL)
        if reap:
            self.process.wait()
        else:
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


@contextmanager
def jobs(count: int, *arguments: str) -> Iterator[list[Job]]:
    started = [Job(*arguments) for _ in range(count)]
    try:
        yield started
    finally:
        for job in started:
            job.kill()
            job.process.communicate()


@pytest.fixture
def job() -> Iterator[Job]:
    with jobs(1) as (one,):
        yield one


def forge(folder: Path, age_s: float = 0.0, **facts: Any) -> dict[str, Any]:
    """The lock that a process like this one would have left, with other facts and an old date."""
    folder.mkdir(exist_ok=True)
    with RunLock.acquire(RunDir(folder), "dsdpo train") as lock:
        facts = {**(holder(RunDir(folder)) or {}), "token": f"forged {lock.token}", **facts}
    write(folder, json.dumps(facts), age_s)
    return facts


def write(folder: Path, content: str, age_s: float) -> None:
    (folder / "LOCK").write_text(content)
    then = time.time() - age_s
    os.utime(folder / "LOCK", (then, then))


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def a_dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# --- one holder ---


def test_the_file_names_the_holder_and_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert holder(RunDir(tmp_path / "new")) is None
    with RunLock.acquire(RunDir(tmp_path / "new"), "dsdpo train") as lock:
        found = holder(RunDir(tmp_path / "new"))
        assert found and found["token"] == lock.token and found["what"] == "dsdpo train"
        assert (found["pid"], found["host"], found["slurm_job"]) == (os.getpid(), socket.gethostname(), "4711")
        assert is_held_by(RunDir(tmp_path / "new"), lock.token) and not is_held_by(RunDir(tmp_path / "new"), "another")
        assert lock.previous is None and os.listdir(tmp_path / "new") == ["LOCK"]
    assert os.listdir(tmp_path / "new") == [] and not is_held_by(RunDir(tmp_path / "new"), lock.token)
    lock.release()


def test_notes_are_added_under_the_same_token(tmp_path: Path) -> None:
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        lock.note(session=12)
        lock.note(session=13, token="mine")
        found = holder(RunDir(tmp_path))
        assert found and (found["session"], found["token"], found["pid"]) == (13, lock.token, os.getpid())
        assert os.listdir(tmp_path) == ["LOCK"]
    assert os.listdir(tmp_path) == []


def test_a_second_job_is_told_who_holds_it(tmp_path: Path, job: Job) -> None:
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train"):
        told = job.acquire(tmp_path)
        assert told.startswith("74 ") and f"process {os.getpid()} on host {socket.gethostname()}" in told
        assert "dsdpo train" in told and "set another output_dir" in told and str(tmp_path / "LOCK") in told
        with pytest.raises(IOFailure, match="in use"):
            RunLock.acquire(RunDir(tmp_path), "dsdpo train")
    assert job.acquire(tmp_path) == "holds"


def test_the_date_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        os.utime(tmp_path / "LOCK", (0, 0))
        wait_for(lambda: (tmp_path / "LOCK").stat().st_mtime > time.time() - 60)
        assert not lock.lost


@pytest.mark.parametrize("content", ['{"token": "another"}', "", None])
def test_a_lost_lock_is_noticed_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    lock = RunLock.acquire(RunDir(tmp_path), "dsdpo train")
    (tmp_path / "LOCK").unlink()
    if content is not None:
        (tmp_path / "LOCK").write_text(content)
    wait_for(lambda: lock.lost)
    with pytest.raises(IOFailure, match="another job's"):
        lock.note(session=1)
    lock.release()
    assert lock.lost and os.listdir(tmp_path) == ([] if content is None else ["LOCK"])
    assert content is None or (tmp_path / "LOCK").read_text() == content


def test_a_file_system_that_is_away_for_a_while_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        refused: list[Path] = []

        def refuse(path: Path) -> bytes:
            refused.append(path)
            raise OSError(errno.ESTALE, "stale file handle")

        with monkeypatch.context() as away:
            away.setattr(module, "_read", refuse)
            wait_for(lambda: len(refused) > 2)
        os.utime(tmp_path / "LOCK", (0, 0))
        wait_for(lambda: (tmp_path / "LOCK").stat().st_mtime > 0)
        assert not lock.lost


def test_a_forked_child_does_not_release(tmp_path: Path) -> None:
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert is_held_by(RunDir(tmp_path), lock.token)


def test_a_refusing_file_system_is_an_io_failure(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(IOFailure, match="taken"):
        RunLock.acquire(RunDir(tmp_path / "taken" / "run"), "dsdpo train")
    (tmp_path / "run" / "LOCK").mkdir(parents=True)
    with pytest.raises(IOFailure, match="LOCK"):
        RunLock.acquire(RunDir(tmp_path / "run"), "dsdpo train")
    with pytest.raises(IOFailure, match="LOCK"):
        holder(RunDir(tmp_path / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_io_failure(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(IOFailure, match="locked"):
        RunLock.acquire(RunDir(tmp_path / "locked"), "dsdpo train")


# --- stale or not ---


@pytest.mark.parametrize("reap", [True, False])
def test_a_killed_holder_is_replaced_at_once(tmp_path: Path, job: Job, reap: bool) -> None:
    assert job.acquire(tmp_path) == "holds"
    before = holder(RunDir(tmp_path))
    job.kill(reap)
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        assert lock.previous == before and before and before["pid"] == job.process.pid
        assert is_held_by(RunDir(tmp_path), lock.token) and os.listdir(tmp_path) == ["LOCK"]


@pytest.mark.skipif(sys.platform != "linux", reason="ends the main thread alone, as Linux can")
def test_a_holder_with_a_thread_left_is_alive(tmp_path: Path) -> None:
    """A killed process counts as ended when its last thread is out of its write, not when the first one is."""
    code = """
import ctypes, sys
from pathlib import Path
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir
lock = RunLock.acquire(RunDir(Path(sys.argv[1])), "dsdpo train")
ctypes.CDLL(None).pthread_exit(None)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    try:
        wait_for(lambda: ") Z" in Path(f"/proc/{process.pid}/stat").read_text())
        with pytest.raises(IOFailure, match=f"process {process.pid} "):
            RunLock.acquire(RunDir(tmp_path), "dsdpo train")
    finally:
        process.kill()
        process.wait()
    RunLock.acquire(RunDir(tmp_path), "dsdpo train").release()


def test_a_link_that_was_made_though_its_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        assert is_held_by(RunDir(tmp_path), lock.token) and lock.previous is None


NEW, OLD = 0.0, EXPIRED_S + 20
OTHER_NAMESPACE = {"pid_namespace": "pid:[1]"}


@pytest.mark.parametrize(
    ("facts", "age_s", "is_stale"),
    [
        ({}, OLD, False),  # this very process: alive, however late its heartbeat
        ({"started": 1}, NEW, True),  # the pid is another process's by now
        ({"started": None}, OLD, False),
        ({"pid": 2**40}, NEW, True),
        ({"host": "elsewhere"}, NEW, False),
        ({"host": "elsewhere"}, EXPIRED_S - 20, False),
        ({"host": "elsewhere"}, OLD, True),
        ({"boot_id": "earlier"}, NEW, False),
        ({"boot_id": "earlier"}, 3 * HEARTBEAT_S, True),
        (OTHER_NAMESPACE, EXPIRED_S - 20, False),
        (OTHER_NAMESPACE, OLD, True),
        ({"pid": "garbage"}, EXPIRED_S - 20, False),
        ({"pid": "garbage"}, OLD, True),
    ],
)
def test_staleness(tmp_path: Path, facts: dict[str, Any], age_s: float, is_stale: bool) -> None:
    forged = forge(tmp_path, age_s, **facts)
    if not is_stale:
        with pytest.raises(IOFailure, match=f"on host {forged['host']}.* last sign of life .* s ago"):
            RunLock.acquire(RunDir(tmp_path), "dsdpo train")
        assert is_held_by(RunDir(tmp_path), forged["token"])
        return
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        assert lock.previous == forged and is_held_by(RunDir(tmp_path), lock.token)


@pytest.mark.parametrize("content", ["", "not json", "[1]", '{"token":'])
def test_what_cannot_be_read_is_judged_by_its_age(tmp_path: Path, content: str) -> None:
    write(tmp_path, content, NEW)
    assert holder(RunDir(tmp_path)) == {}
    with pytest.raises(IOFailure, match="does not name"):
        RunLock.acquire(RunDir(tmp_path), "dsdpo train")
    write(tmp_path, content, OLD)
    with RunLock.acquire(RunDir(tmp_path), "dsdpo train") as lock:
        assert lock.previous == {} and is_held_by(RunDir(tmp_path), lock.token)


def test_age_is_told_by_the_file_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(tmp_path, host="elsewhere")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10 * EXPIRED_S)
    with pytest.raises(IOFailure, match="elsewhere"):
        RunLock.acquire(RunDir(tmp_path), "dsdpo train")


# --- races ---


@pytest.fixture(scope="module", params=["links", "no-links"])
def racers(request: pytest.FixtureRequest) -> Iterator[list[Job]]:
    with jobs(8, request.param) as started:
        yield started


@pytest.mark.parametrize("before", ["nothing", "stale", "garbage"])
def test_one_of_many_wins(tmp_path: Path, racers: list[Job], before: str) -> None:
    for turn in range(20):
        folder = tmp_path / str(turn)
        if before != "nothing":
            forge(folder, OLD, pid=a_dead_pid(), started=1)
        if before == "garbage":
            write(folder, "{", OLD)
        start = time.time() + 0.02
        for racer in racers:
            racer.ask(folder, start)
        answers = [racer.answer() for racer in racers]
        assert answers.count("holds") == 1 and sum(a.startswith("74 ") for a in answers) == 7, answers
        winner = racers[answers.index("holds")].process.pid
        assert (holder(RunDir(folder)) or {}).get("pid") == winner
        assert sum(f"process {winner} on" in a for a in answers) == 7, answers
        assert os.listdir(folder) == ["LOCK"]


def test_never_two_at_a_time(tmp_path: Path) -> None:
    churners = [
        subprocess.Popen(
            [sys.executable, "-c", CHURN, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        for _ in range(4)
    ]
    turns = [int(churner.communicate()[0]) for churner in churners]
    assert sum(turns) > 4 and os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("old", [None, b"stale"])
def test_the_claim_of_a_job_killed_while_it_took_over(tmp_path: Path, old: bytes | None) -> None:
    """While it is new nobody else changes the lock; when it is old it stands in nobody's way."""
    file = tmp_path / "LOCK"
    if old is not None:
        file.write_bytes(old)
    left = module._claim(file, old)
    assert left and module._claim(file, old) is None
    os.utime(left, (0, 0))
    second = module._claim(file, old)
    assert second and module._claim(file, old) is None
    second.unlink()
    assert module._claim(file, b"something else")
    assert module._swap(file, old, b"new") and file.read_bytes() == b"new"


def test_a_takeover_that_does_not_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.001)
    write(tmp_path, "{", OLD)
    assert module._claim(tmp_path / "LOCK", b"{")
    with pytest.raises(IOFailure, match="being taken over by another job; try again in 120 s"):
        RunLock.acquire(RunDir(tmp_path), "dsdpo train")


def test_a_late_taker_leaves_what_changed_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "LOCK"
    file.write_bytes(b"the winner's")
    assert not module._swap(file, b"stale", b"the late one's") and not module._swap(file, b"stale", None)
    assert not module._swap(file, None, b"a new one's")
    assert file.read_bytes() == b"the winner's" and os.listdir(tmp_path) == ["LOCK"]
