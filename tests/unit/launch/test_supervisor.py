"""Stop requests, orphans and exit codes, with real processes and real signals."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.launcher.multinode_runner import PDSHRunner

from dsdpo.config.load import load
from dsdpo.config.schema import RunConfig
from dsdpo.errors import HangError, IOFailure, StopRequested
from dsdpo.launch.deepspeed import (
    Launch,
    StopRequests,
    for_pdsh,
    free_port,
    launch_command,
    launch_environment,
    run_launcher,
)
from dsdpo.launch.preflight import ClusterRequest
from dsdpo.launch.supervisor import _devices, _visible_devices, exit_code_from, has_started_over, start_over
from dsdpo.launch.task import Task, clear_marks
from dsdpo.launch.worker import _write_exit
from dsdpo.runtime.env import Allocation, Mesh
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, write_exit

REPOSITORY = Path(__file__).parents[3]
ARGV = Task("train", "run.yaml", ["--beta", "0.2"]).argv("t0k3n")

# A rank that starts a helper, waits for the stop file, says how it ended and leaves with a useless exit code.
RANK = """
import pathlib, subprocess, sys, time
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, write_exit
out = pathlib.Path(sys.argv[1])
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
(out / "pids").write_text(f"{helper.pid}")
while not (out / "STOP").exists():
    time.sleep(0.05)
write_exit(RunDir(out), ExitRecord(75, "stopped on request", 0))
sys.exit(1)
"""
SUPERVISOR = """
import os, pathlib, signal, sys
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir
from dsdpo.launch.deepspeed import Launch, StopRequests, run_launcher
from dsdpo.launch.supervisor import exit_code_from
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
out = pathlib.Path(sys.argv[1])
try:
    with RunLock.acquire(RunDir(out), "test") as lock, StopRequests(RunDir(out)) as requests:
        launch = Launch([sys.executable, "-c", sys.argv[2], str(out)], dict(os.environ), "")
        status = run_launcher(launch, RunDir(out), requests, lock)
except KeyboardInterrupt:
    sys.exit(130)
sys.exit(exit_code_from("train", RunDir(out), status))
"""


def run(command: list[str], out: Path, environment: Mapping[str, str] = os.environ) -> int:
    """run_launcher, as a supervisor calls it."""
    with RunLock.acquire(RunDir(out), "test") as lock, StopRequests(RunDir(out)) as requests:
        return run_launcher(Launch(command, dict(environment), ""), RunDir(out), requests, lock)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Running, and not a zombie that its new parent has yet to collect."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started = []

    def start(rank: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SUPERVISOR, str(tmp_path), rank]
        started.append(subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE))
        wait_for((tmp_path / "pids").exists)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()  # not communicate(): a rank that outlived a failed test would hold the pipe open
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_becomes_the_stop_file_and_the_exit_record_counts(
    tmp_path: Path, supervisor: Callable[[str], subprocess.Popen[bytes]], number: signal.Signals
) -> None:
    process = supervisor(RANK)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert RunDir(tmp_path).stop.read_text() == number.name
    helper = int((tmp_path / "pids").read_text())
    wait_for(lambda: not is_alive(helper))


def test_a_second_interrupt_ends_everything_at_once(
    tmp_path: Path, supervisor: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    process = supervisor(RANK.replace('"STOP"', '"NEVER"'))
    process.send_signal(signal.SIGINT)
    wait_for(RunDir(tmp_path).stop.exists)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    helper = int((tmp_path / "pids").read_text())
    wait_for(lambda: not is_alive(helper))


def test_ranks_that_outlive_the_launcher_are_ended(tmp_path: Path) -> None:
    launcher = (
        "import pathlib, subprocess, sys;"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']);"
        "pathlib.Path(sys.argv[1], 'pids').write_text(str(rank.pid))"
    )
    assert run([sys.executable, "-c", launcher, str(tmp_path)], tmp_path) == 0
    orphan = int((tmp_path / "pids").read_text())
    wait_for(lambda: not is_alive(orphan))


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run([sys.executable, "-c", ""], tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("task", "completed", "told", "status", "code"),
    [
        ("train", True, 0, 0, 0),
        ("train", True, None, 1, 0),  # done is done, whatever the launcher makes of the ranks' goodbye
        ("train", False, 75, 1, 75),
        ("train", False, 70, 1, 70),
        ("train", False, 70, 0, 70),
        ("train", False, 1, 1, 1),
        ("train", False, None, 1, 1),
        ("train", False, None, 74, 74),  # the disk was too full to say so
        ("train", False, 1, 71, 71),  # rank 0 lost its peer before the one that saw the hang could speak
        ("eval", True, None, 1, 1),  # COMPLETED is of the training before
        ("eval", False, 0, 0, 0),
        ("reference", False, 65, 1, 65),
    ],
)
def test_the_exit_code_is_that_of_the_record(
    tmp_path: Path, task: str, completed: bool, told: int | None, status: int, code: int
) -> None:
    if completed:
        RunDir(tmp_path).completed.write_text("")
    if told is not None:
        write_exit(RunDir(tmp_path), ExitRecord(told, "word", 0))
    assert exit_code_from(task, RunDir(tmp_path), status) == code


@pytest.mark.parametrize(
    ("told", "status", "said"),
    [
        (None, 247, "SIGKILL"),
        (None, 137, "SIGKILL"),
        (None, -9, "SIGKILL"),
        (1, 245, "SIGSEGV"),  # the main rank lost its peer
        (None, 0, "without finishing"),
        (0, 0, "without finishing"),
    ],
)
def test_a_rank_that_died_is_a_hang(tmp_path: Path, told: int | None, status: int, said: str) -> None:
    if told is not None:
        write_exit(RunDir(tmp_path), ExitRecord(told, "word", 0))
    with pytest.raises(HangError, match=said):
        exit_code_from("train", RunDir(tmp_path), status)


@pytest.mark.parametrize("main", [None, 1, 71])
def test_a_peers_record_counts_when_the_main_rank_knows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: int | None
) -> None:
    if main is not None:
        write_exit(RunDir(tmp_path), ExitRecord(main, "connection reset by peer", 0))
    for rank in (3, 4):
        _write_exit(RunDir(tmp_path), Mesh(rank, 8, rank), IOFailure("disk full"))
    assert exit_code_from("train", RunDir(tmp_path), 74) == 74
    assert capsys.readouterr().err == "rank 3: disk full\n"


def test_the_main_ranks_record_goes_before_a_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_exit(RunDir(tmp_path), Mesh(1, 2, 1), StopRequested("stopped"))
    write_exit(RunDir(tmp_path), ExitRecord(75, "stopped", 0))
    assert exit_code_from("train", RunDir(tmp_path), 75) == 75
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "printed"), [(0, ""), (2, "rank 2: rank 1 is silent\n")])
def test_a_message_is_printed_unless_rank_0_has_done_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int, printed: str
) -> None:
    write_exit(RunDir(tmp_path), ExitRecord(71, "rank 1 is silent", rank))
    assert exit_code_from("train", RunDir(tmp_path), 71) == 71
    assert capsys.readouterr().err == printed


def test_a_peer_file_of_an_earlier_version_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDir(tmp_path).peer_exit.write_text('{"code": 74, "message": "rank 3: disk full"}')
    assert exit_code_from("train", RunDir(tmp_path), 1) == 74
    assert capsys.readouterr().err == "rank 3: disk full\n"


@pytest.mark.start
def test_a_hang_is_not_waited_for(tmp_path: Path) -> None:
    """A launcher waits for the rank that hangs; the supervisor does not."""
    rank = """
import pathlib, sys, time
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, write_exit
write_exit(RunDir(pathlib.Path(sys.argv[1])), ExitRecord(71, "rank 1 is silent", 0))
time.sleep(100)
"""
    started = time.monotonic()
    status = run([sys.executable, "-c", rank, str(tmp_path)], tmp_path, {**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert exit_code_from("train", RunDir(tmp_path), status) == 71 and time.monotonic() - started < 60


def test_before_there_are_ranks_a_stop_signal_ends_the_supervisor(tmp_path: Path) -> None:
    with pytest.raises(StopRequested), StopRequests(RunDir(tmp_path)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert not RunDir(tmp_path).stop.exists()


def test_that_a_peer_hangs_goes_before_what_its_loss_did(tmp_path: Path) -> None:
    write_exit(RunDir(tmp_path), ExitRecord(71, "rank 1 hangs", 0))
    write_exit(RunDir(tmp_path), ExitRecord(1, "connection reset by peer", 0))
    assert exit_code_from("train", RunDir(tmp_path), 1) == 71


def test_marks_of_an_earlier_attempt_are_cleared(tmp_path: Path) -> None:
    task = Task("train", "run.yaml", [])
    clear_marks(task, config_in(tmp_path / "not_there"))
    run_dir = RunDir(tmp_path)
    for path in (run_dir.stop, run_dir.exit, run_dir.peer_exit, run_dir.completed):
        path.write_text("")
    clear_marks(Task("eval", "run.yaml", []), config_in(tmp_path))
    assert list(tmp_path.iterdir()) == [run_dir.completed]
    clear_marks(task, config_in(tmp_path))
    assert not list(tmp_path.iterdir())


def config_in(output_dir: Path) -> RunConfig:
    return RunConfig(model_name_or_path="m", dataset=["d"], output_dir=str(output_dir))


@pytest.mark.parametrize(
    ("cluster", "devices", "environment", "ids"),
    [
        (ClusterRequest(), 0, {}, "0"),
        (ClusterRequest(num_accelerators=3), 0, {}, "0 1 2"),
        (ClusterRequest(num_accelerators=3), 0, {"CUDA_VISIBLE_DEVICES": ""}, "0 1 2"),
        (ClusterRequest(), 3, {}, "0 1 2"),
        (ClusterRequest(num_accelerators=2), 8, {}, "0 1"),
        (ClusterRequest(), 2, {"CUDA_VISIBLE_DEVICES": "4,5"}, "4 5"),
        (ClusterRequest(num_accelerators=1), 2, {"CUDA_VISIBLE_DEVICES": "4,5"}, "4"),
        (ClusterRequest(), 2, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "GPU-a GPU-b"),
    ],
)
def test_the_launchers_command_line_on_this_machine(
    cluster: ClusterRequest, devices: int, environment: dict[str, str], ids: str
) -> None:
    command = launch_command(ARGV, cluster, devices, environment)
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    world = command[4].removeprefix("--world_info=")
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ids.split()}
    assert {"--node_rank=0", "--master_addr=127.0.0.1", "--no_local_rank"} < set(command)
    assert command[command.index("--module") :] == ["--module", "dsdpo", *ARGV]


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (ClusterRequest(include="localhost:1"), "--include localhost:1"),
        (ClusterRequest(exclude="localhost:1"), "--exclude localhost:1"),
        (ClusterRequest(hostfile="hosts", exclude="b"), "--hostfile hosts --force_multi --exclude b"),
        (ClusterRequest(hostfile="hosts", master_addr="a"), "--master_addr a --hostfile hosts --force_multi"),
        (
            ClusterRequest(hostfile="hosts", num_accelerators=4),
            "--hostfile hosts --force_multi --num_accelerators 4",
        ),
    ],
)
def test_the_launchers_command_line_for_chosen_hosts_and_devices(cluster: ClusterRequest, expected: str) -> None:
    command = launch_command(ARGV, cluster, 8, {})
    port = command.index("--master_port")
    module = command.index("--module")
    assert " ".join(command[port + 2 : module]) == expected
    assert command[module:] == ["--module", "dsdpo", *ARGV]
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]


@pytest.mark.parametrize(
    "argument", ["plain", "", "a b", "$HOME", "`id`", "a;b", "(x)", "it's", 'say "a b"', "\\", "\\ $x `id` 'y'", "*"]
)
def test_an_argument_arrives_on_another_host_as_it_was(argument: str) -> None:
    """Through what the launcher does to it, and a shell."""
    runner = PDSHRunner(SimpleNamespace(user_args=[for_pdsh(argument)], user_script=""), "")
    command = " ".join(["printf", "'<%s>'", *runner.user_arguments])
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert said == f"<{argument}>"


@pytest.mark.parametrize(
    ("gpus", "is_here", "accelerator", "devices"),
    [
        (4, True, None, 4),
        (0, True, None, 0),
        (None, True, None, 8),  # a cluster without a GRES for GPUs
        (None, True, "cpu", 0),
        (None, False, None, 0),  # salloc's shell, on a login node that may have a GPU of its own
    ],
)
def test_gpus_of_a_job_are_those_slurm_gave_or_else_those_seen(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, is_here: bool, accelerator: str | None, devices: int
) -> None:
    monkeypatch.setattr("dsdpo.launch.supervisor._visible_devices", lambda: 8)
    monkeypatch.setattr(os, "environ", {"DS_ACCELERATOR": accelerator} if accelerator else {})
    assert _devices(ClusterRequest(), Allocation("41", 2, "n[1-2]", gpus, 0, "41", is_here)) == devices


def test_devices_are_counted_as_torch_counts_them() -> None:
    assert _visible_devices() == torch.cuda.device_count()


def test_fresh_is_noted_for_the_job_that_began_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert not has_started_over(RunDir(tmp_path), "41")
    start_over(RunDir(tmp_path), confirmed=True, job="41")
    assert has_started_over(RunDir(tmp_path), "41") and not has_started_over(RunDir(tmp_path), "42")
    start_over(RunDir(tmp_path), confirmed=False, job="42")  # there is nothing to move aside now
    assert has_started_over(RunDir(tmp_path), "42")


def test_a_given_port_is_used_and_else_a_free_one() -> None:
    assert "--master_port=4321" in launch_command(ARGV, ClusterRequest(master_port=4321), 0, {})
    assert 1024 <= free_port() <= 65535


def test_the_ranks_environment() -> None:
    on_cpu = launch_environment(ClusterRequest(num_accelerators=2), 0, {"PATH": "x"})
    assert on_cpu["DS_ACCELERATOR"] == "cpu"
    assert int(on_cpu["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert on_cpu["PATH"] == os.pathsep.join([str(Path(sys.executable).parent), "x"])
    kept = launch_environment(ClusterRequest(), 0, {"OMP_NUM_THREADS": "7", "DS_ACCELERATOR": "xpu"})
    assert (kept["OMP_NUM_THREADS"], kept["DS_ACCELERATOR"]) == ("7", "xpu")
    on_gpu = launch_environment(ClusterRequest(), 2, {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert not {"DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} & set(on_gpu)


def launched(tmp_path: Path, rank: str, ranks: int) -> int:
    """A rank program under the real launcher, with the command line and environment of a real run."""
    script = tmp_path / "rank.py"
    script.write_text(rank)
    cluster = ClusterRequest(num_accelerators=ranks)
    command = launch_command(ARGV, cluster, 0, os.environ)
    command = [*command[: command.index("--module")], str(script), str(tmp_path)]
    environment = launch_environment(cluster, 0, os.environ) | {"PYTHONPATH": str(REPOSITORY)}
    return run(command, tmp_path, environment)


@pytest.mark.start
def test_a_killed_rank_under_the_real_launcher(tmp_path: Path) -> None:
    rank = (
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)\n"
    )
    with pytest.raises(HangError, match="SIGKILL"):
        exit_code_from("train", RunDir(tmp_path), launched(tmp_path, rank, 2))


@pytest.mark.start
def test_the_real_launcher_places_ranks_and_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rank = (
        "import json, pathlib, sys\n"
        "from dsdpo.runtime.env import launched\n"
        "place = launched()\n"
        "print(f'hello from {place.rank}\\n', end='')  # in one write\n"
        "place_file = pathlib.Path(sys.argv[1], f'{place.rank}.json')\n"
        "place_file.write_text(json.dumps([place.rank, place.world_size]))\n"
    )
    assert launched(tmp_path, rank, 2) == 0
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[0, 2], [1, 2]]
    said = capfd.readouterr()
    assert sorted((said.out + said.err).splitlines()) == ["hello from 0", "hello from 1"]


def test_a_task_survives_the_command_line(tmp_path: Path) -> None:
    """What the supervisor hands on gives the ranks the same config."""
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\n")
    overrides = ["--run_name", "a b: c", "--loss_type=[sigmoid, sft]", "--loss_weights", "1,0.5"]
    task = Task("eval", str(path), overrides, model="final")
    argv = task.argv("t0k3n")
    assert argv[:6] == ["eval", str(path), "--model", "final", "--supervised", "t0k3n"]
    assert load(path, argv[6:]) == load(path, overrides)
