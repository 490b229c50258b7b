"""Who is named when nothing moves, and who ends by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsdpo.runtime.env import Mesh
from dsdpo.runtime.lock import RunLock, this_process
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.watchdog import Watch

ROOT = Path(__file__).parents[3]


def tell(output_dir: Path, rank: int, beats: int, age: float = 0.0, token: str = "t", **more: object) -> None:
    path = output_dir / "ranks" / f"rank-{rank:05d}.json"
    path.parent.mkdir(exist_ok=True)
    facts = {"token": token, "beats": beats, "host": f"node-{rank}", "pid": 100 + rank, **more}
    path.write_text(json.dumps(facts))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(
    ("beats", "ages", "tokens", "named", "first"),
    [
        ((7, 7, 7), (0, 500, 0), "ttt", "rank 1 (host node-1, pid 101), without a sign of life for 500 s", 0),
        ((7, 7, 7), (600, 0, 0), "ttt", "rank 0 (host node-0, pid 100), without a sign of life for 600 s", 1),
        ((7, 7, 6), (0, 0, 0), "ttt", "rank 2 (host node-2, pid 102) is behind the others", 0),
        ((7, 7, 7), (0, 0, 0), "ttt", "all others have come equally far", 0),
        ((7, 9, 7), (0, 0, 0), "tot", "rank 1 (host node-1, pid 101), without", 0),  # a file of an earlier job
    ],
)
def test_the_rank_that_is_silent_or_behind_is_named(
    tmp_path: Path, beats: tuple[int, ...], ages: tuple[float, ...], tokens: str, named: str, first: int
) -> None:
    for rank in range(3):
        tell(tmp_path, rank, beats[rank], ages[rank], tokens[rank])
    me = 0 if first == 0 else 1
    text, found = Watch(RunDir(tmp_path), Mesh(me, 3, me), 120.0, "t").diagnose(121.0)
    assert named in text and "No progress for 121 s" in text and found == first


def test_a_rank_without_a_file_is_silent(tmp_path: Path) -> None:
    tell(tmp_path, 0, 3)
    assert "rank 1 (host ?, pid ?)" in Watch(RunDir(tmp_path), Mesh(0, 2, 0), 120.0, "t").diagnose(121.0)[0]


def test_a_rank_on_this_host_that_has_died_is_known_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    me = this_process()
    tell(tmp_path, 0, 3, **me)
    tell(tmp_path, 1, 3, **{**me, "pid": gone.pid})
    watch = Watch(RunDir(tmp_path), Mesh(0, 2, 0), 120.0, "t")
    assert watch._neighbour_has_died() and f"pid {gone.pid}), which has died" in watch.diagnose(10.0)[0]
    for elsewhere in ({"host": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": "another"}):
        tell(tmp_path, 1, 3, **{**me, "pid": gone.pid, **elsewhere})
        assert not watch._neighbour_has_died(), "a process id means nothing there"


RANK = """
import sys, time
from pathlib import Path
import dsdpo.runtime.watchdog
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.watchdog import Watch
out, timeout, token, beats = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] or None, int(sys.argv[4])
watch = Watch(RunDir(out), Mesh(0, 1, 0), timeout, token)
watch.start()
for step in range(beats):
    watch.beat(step)
(out / "ready").touch()
if beats == 8:
    dsdpo.runtime.watchdog._LONG_S = 1.0
    with watch.slow("an evaluation"):
        for _ in range(30):
            time.sleep(0.1)
            watch.goes_on()
    watch.close()
    sys.exit(0)
if beats == 9:
    with watch.slow("a save"):
        time.sleep(3)
    watch.close()
    sys.exit(0)
time.sleep(100)
"""


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", RANK, str(tmp_path), *arguments]
    process = subprocess.Popen(line, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    return process


def test_no_progress_ends_with_71_stacks_and_a_word(tmp_path: Path) -> None:
    process = start(tmp_path, "1.0", "", "5")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 71 and "No progress for" in said and "in step 5" in said
    assert "<module>" in (tmp_path / "ranks" / "stacks-00000.txt").read_text()
    record = json.loads((tmp_path / "EXIT").read_text())
    assert (record["code"], record["rank"]) == (71, 0)


@pytest.mark.parametrize("beats", ["0", "2", "9"])
def test_first_steps_and_saves_may_take_longer(tmp_path: Path, beats: str) -> None:
    process = start(tmp_path, "0.5", "", beats)
    time.sleep(2)
    assert process.poll() in (None, 0)
    process.kill()
    process.communicate()


def test_what_is_slow_may_take_any_time_as_long_as_it_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "0.5", "", "8")
    assert process.wait(30) == 0, process.communicate()[1]
    process.communicate()


@pytest.mark.start
def test_the_time_of_a_job_that_is_suspended_does_not_count(tmp_path: Path) -> None:
    process = start(tmp_path, "3.0", "", "5")
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 71 and "No progress for 3 s" in said, said


@pytest.mark.start
def test_a_rank_ends_when_the_holder_of_the_lock_is_gone(tmp_path: Path) -> None:
    holder = (
        "import sys, time, pathlib; from dsdpo.runtime.lock import RunLock; from dsdpo.runtime.rundir import RunDir;"
        "lock = RunLock.acquire(RunDir(pathlib.Path(sys.argv[1])), 'test');"
        "print(lock.token, flush=True); time.sleep(100)"
    )
    held = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert held.stdout is not None
    process = start(tmp_path, "20", held.stdout.readline().strip(), "5")
    time.sleep(3)
    assert process.poll() is None
    held.kill()
    held.communicate()
    assert process.wait(20) == -signal.SIGKILL
    process.communicate()


def test_a_rank_ends_when_another_job_has_the_lock(tmp_path: Path) -> None:
    with RunLock.acquire(RunDir(tmp_path), "another"):
        process = start(tmp_path, "10", "mine", "5")
        assert process.wait(20) == -signal.SIGKILL
        process.communicate()


@pytest.mark.start
def test_a_rank_ends_when_the_lock_is_given_back(tmp_path: Path) -> None:
    """A supervisor on another host that is interrupted does so, and cannot kill the ranks here."""
    with RunLock.acquire(RunDir(tmp_path), "test") as lock:
        process = start(tmp_path, "10", lock.token, "5")
        time.sleep(3)
        assert process.poll() is None
    assert process.wait(20) == -signal.SIGKILL
    process.communicate()
