"""srun's command line, a node's launcher, and which ends put a job back into the queue, with no SLURM at hand."""

from __future__ import annotations

import argparse
import base64
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsdpo.errors import ConfigError, HangError, IOFailure
from dsdpo.launch import slurm
from dsdpo.launch.preflight import ClusterRequest
from dsdpo.launch.slurm import Attempts, _can_go_on, _put_back, ranks_per_node, srun_command
from dsdpo.launch.slurm_node import launcher
from dsdpo.runtime.env import Allocation, job_port
from dsdpo.runtime.rundir import RunDir

JOB = Allocation("41", 2, "localhost", 4, 0, "41", True)


@pytest.mark.parametrize(("wanted", "gpus", "ranks"), [(None, 4, 4), (2, 4, 2), (None, 0, 1), (3, 0, 3)])
def test_a_rank_for_each_gpu(wanted: int | None, gpus: int, ranks: int) -> None:
    assert ranks_per_node(wanted, gpus) == ranks


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="the job has 4 GPUs on each node"):
        ranks_per_node(5, 4)


def test_one_task_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    environment = {"DSDPO_SRUN_ARGS": "--container-image='a b' --label", "HF_TOKEN": "secret"}
    command = srun_command(["train", "run.yaml"], JOB, 4, RunDir(tmp_path), ClusterRequest(), environment)
    assert command[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert {"--kill-on-bad-exit=1", "--cpu-bind=none", "--export=ALL", "--container-image=a b", "--label"} < set(
        command
    )
    node = command[command.index("-m") :]
    assert command[command.index("-m") - 1] == sys.executable
    assert node[1:6] == ["dsdpo.launch.slurm_node", "--nodes", "2", "--ranks", "4"]
    assert node[6:10] == ["--master_addr", "localhost", "--master_port", str(job_port("41"))]
    assert node[-3:] == ["--", "train", "run.yaml"] and "secret" not in " ".join(command)


def test_the_nodes_interpreter_and_the_port_can_be_others(tmp_path: Path) -> None:
    cluster = ClusterRequest(master_addr="ib-n1", master_port=4321)
    command = srun_command(["train"], JOB, 4, RunDir(tmp_path), cluster, {"DSDPO_PYTHON": "python3"})
    assert command[command.index("-m") - 1] == "python3" and {"ib-n1", "4321"} < set(command)


@pytest.mark.parametrize(
    ("visible", "ids"), [("", ["0", "1"]), ("2,5", ["2", "5"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b"])]
)
def test_a_node_uses_the_gpus_that_slurm_gave_it(visible: str, ids: list[str]) -> None:
    args = argparse.Namespace(nodes=3, ranks=2, master_addr="n1", master_port="4321", argv=["train", "run.yaml"])
    command = launcher(args, 1, visible)
    world = next(word for word in command if word.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(world)) == {f"node-{i}": ids for i in range(3)}
    assert "--node_rank=1" in command and command[-4:] == ["--module", "dsdpo", "train", "run.yaml"]


def test_a_node_with_fewer_gpus_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(nodes=3, ranks=2, master_addr="n1", master_port="4321", argv=["train"])
    with pytest.raises(SystemExit) as end:
        launcher(args, 1, "7")
    assert end.value.code == 64 and "2 ranks are wanted on each node, but SLURM gave 1 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "received", "stop", "goes_on"),
    [
        (0, None, None, False),
        (64, None, None, False),
        (65, None, None, False),
        (66, None, None, False),
        (70, None, None, False),
        (71, None, None, True),
        (72, None, None, False),
        (74, None, None, True),
        (1, None, None, True),
        (75, "SIGUSR1", "SIGUSR1", True),  # the scheduler's warning
        (75, None, None, True),  # max_time
        (75, "SIGUSR1", None, True),  # before there were ranks
        (75, "SIGTERM", "SIGTERM", False),  # scancel
        (75, "SIGINT", "SIGINT", False),
        (75, None, "", False),  # a person made the file
        (75, None, "attempt 2 of the job", False),  # the job is elsewhere by now
        (75, "SIGUSR1", "", False),  # a person was first
    ],
)
def test_what_goes_back_into_the_queue(
    tmp_path: Path, code: int, received: str | None, stop: str | None, goes_on: bool
) -> None:
    if stop is not None:
        RunDir(tmp_path).stop.write_text(stop)
    assert _can_go_on(RunDir(tmp_path), code, received) == goes_on


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Attempts of job 41 that end with some codes after some steps; what becomes of each."""

    def attempts(*ends: tuple[int | None, int], first: int = 0, job: str = "41") -> list[str]:
        said = []
        monkeypatch.setattr(slurm, "_put_back", lambda job: said.append(f"again {job.restarts + 1}") or "again")
        for number, (code, step) in enumerate(ends, first):
            attempt = Attempts(Allocation(job, 2, "localhost", 4, number, job, True), RunDir(tmp_path))
            try:
                attempt.begin()
            except HangError:
                said.append("refused")
                continue
            monkeypatch.setattr(slurm, "_newest_step", lambda _, step=step: step)
            before = len(said)
            if code is not None:  # else its node died
                attempt.end(code, "SIGUSR1" if code == 75 else None)
                said += ["the end"] * (len(said) == before)
        return said

    monkeypatch.setattr(slurm, "_newest_step", lambda _: 0)
    return attempts


def test_three_failures_where_they_began_are_the_end(queue: Callable[..., list[str]]) -> None:
    assert queue((71, 0), (1, 0), (74, 0)) == ["again 1", "again 2", "the end"]
    assert queue((71, 0), job="42") == ["again 1"]  # submitted anew


def test_progress_counts_from_the_start_again(queue: Callable[..., list[str]]) -> None:
    ends = [(71, 0), (71, 0), (71, 5), (71, 5), (71, 5), (71, 5)]
    assert queue(*ends) == [*(f"again {n}" for n in range(1, 6)), "the end"]


def test_dead_nodes_count_as_failures(queue: Callable[..., list[str]]) -> None:
    assert queue((None, 0), (None, 0), (None, 0), (None, 0)) == ["refused"]


@pytest.mark.parametrize(("asked", "said"), [("SIGTERM", []), ("SIGUSR1", []), ("", ["refused"])])
def test_what_the_scheduler_kills_after_it_has_asked_is_no_failure(
    tmp_path: Path, queue: Callable[..., list[str]], asked: str, said: list[str]
) -> None:
    """A save may take longer than the time SLURM leaves; a STOP without a word is a person's."""
    RunDir(tmp_path).stop.write_text(asked)
    assert queue((None, 0), (None, 0), (None, 0), (None, 0)) == said
    assert queue(*[(None, 0)] * 17, first=4) == (["refused"] if asked else ["refused"] * 17)


def test_what_the_scheduler_stops_is_no_failure(queue: Callable[..., list[str]]) -> None:
    """Filling a reference store takes what it takes, without a checkpoint."""
    said = queue(*[(75, 0)] * 20)
    assert said == [*(f"again {n}" for n in range(1, 20)), "the end"]


def test_mistakes_and_ends_are_the_end(queue: Callable[..., list[str]]) -> None:
    for number, code in enumerate((0, 64, 65, 66, 70)):
        assert queue((code, 0), job=str(number)) == ["the end"]


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A `scontrol` that says something on stderr, fails a few times, then succeeds; the file of its calls."""

    def answers(fails: str, says: str) -> Path:
        calls = tmp_path / "calls"
        script = f"""#!/bin/bash
echo "$@" >> {calls}
if [ "$(wc -l < {calls})" -le {fails} ]; then echo '{says}' >&2; exit 1; fi
echo 'JobId=41 JobState=RUNNING Restarts=0'
"""
        (tmp_path / "scontrol").write_text(script)
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(slurm, "_CONTROLLER_PAUSE_S", 0.01)
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # it ignores SIGTERM from then on
        return calls

    return answers


def test_a_controller_that_is_away_is_asked_again(controller: Callable[[str, str], Path]) -> None:
    calls = controller("3", "slurm_load_jobs error: Socket timed out on send/recv operation")
    assert _put_back(JOB) == "put back into the queue"
    assert calls.read_text().splitlines() == [*["show job 41 --oneliner"] * 4, "requeue Incomplete 41"]


def test_what_the_controller_says_of_the_job_stands(controller: Callable[[str, str], Path]) -> None:
    calls = controller("9", "slurm_load_jobs error: Invalid job id specified")
    assert _put_back(JOB) == "cannot be put back into the queue: slurm_load_jobs error: Invalid job id specified"
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "received", "again"), [(74, None, True), (75, "SIGUSR1", True), (75, "SIGTERM", False), (75, None, False)]
)
def test_a_folder_that_is_away_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, received: str | None, again: bool
) -> None:
    said = []
    monkeypatch.setattr(slurm, "_put_back", lambda job: said.append(job.name) or "again")
    attempts = Attempts(JOB, RunDir(tmp_path))
    attempts.begin()
    RunDir(tmp_path).attempts.write_text("{damaged")
    attempts.end(code, received)
    assert said == ["41"] * again


@pytest.mark.parametrize("line", ["{damaged", "[1]", '{"job": "41", "at": 3}'])
def test_a_damaged_list_of_attempts_is_told(tmp_path: Path, line: str) -> None:
    RunDir(tmp_path).attempts.write_text(line)
    with pytest.raises(IOFailure, match=r"attempts.jsonl does not hold .* remove it"):
        Attempts(JOB, RunDir(tmp_path)).begin()


def test_what_cannot_be_counted_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk every attempt would end with 74 before it is noted, and the job would go round for ever."""

    def full(path: Path, content: str) -> None:
        raise IOFailure("disk full")

    said = []
    monkeypatch.setattr(slurm, "_put_back", lambda job: said.append(job.name) or "again")
    monkeypatch.setattr(slurm, "write_atomically", full)
    attempts = Attempts(JOB, RunDir(tmp_path))
    with pytest.raises(IOFailure):
        attempts.begin()
    attempts.end(74, None)
    assert not said
