"""`dsdpo train` and its kin, started plainly or as one rank.

Started plainly, this process prepares the data, starts the `deepspeed` launcher in a session of its own,
turns stop signals into the file output_dir/STOP, waits, ends what is left over and derives the exit code from
what rank 0 wrote: the launcher's own exit code is no help, since it can be 0 after a rank was killed and 1
after a clean stop.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dsdpo.config.schema import RunConfig
from dsdpo.dist import Ranks
from dsdpo.errors import ConfigError, DsdpoError, HangError
from dsdpo.files import write_atomically
from dsdpo.train.stop import COMPLETED_FILE, EXIT_FILE, STOP_FILE
from dsdpo.use.preflight import ClusterRequest, check_device, preflight, reload

PEER_EXIT_FILE = "EXIT_PEER"
# Activations are freed and allocated anew in every step. By default glibc hands them back to the kernel, and a tenth of
# a step on a CPU goes into page faults; this keeps up to 32 GiB, in huge pages where the kernel allows it.
KEEP_FREED_MEMORY = ":".join(
    f"glibc.malloc.{knob}" for knob in ("hugetlb=1", f"mmap_threshold={2**25}", f"trim_threshold={2**35}")
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Task:
    """What to do (`train`, `reference` or `eval`), on which YAML, with which overrides and `--model`."""

    name: str
    path: str
    overrides: list[str]
    model: str | None = None

    def argv(self) -> list[str]:
        """The arguments that make a rank do this under a supervisor."""
        model = ["--model", self.model] if self.model else []
        return [self.name, self.path, *model, "--supervised", *self.overrides]


# --- one rank under a launcher ---


def join(task: Task, ranks: Ranks, supervised: bool) -> int:
    """Take this rank's place. Raises DsdpoError; the main rank's cause is in output_dir/EXIT as well."""
    if supervised:
        config = reload(task.path, task.overrides)
    else:
        config = preflight(task.path, task.overrides, task.name, model=task.model)
        _prepare_as_rank(config, ranks)
    from dsdpo.train.tasks import run

    try:
        run(config, task.name, task.model)
    except DsdpoError as error:
        if not ranks.is_main:
            _tell_as_peer(Path(config.output_dir), ranks, error)
        raise
    if ranks.is_main and not supervised:
        _finish(task, config)
    return 0


def _tell_as_peer(output_dir: Path, ranks: Ranks, error: DsdpoError) -> None:
    """Leave what happened to this rank alone, such as a full disk; the first of several ranks to do so wins."""
    with suppress(OSError), (output_dir / PEER_EXIT_FILE).open("x") as stream:
        json.dump({"code": error.exit_code, "message": f"rank {ranks.rank}: {error}"}, stream)


def _prepare_as_rank(config: RunConfig, ranks: Ranks) -> None:
    """Without a supervisor the main rank prepares; the others wait for its files, not in a collective."""
    if ranks.is_main:
        clear_marks(Path(config.output_dir))
        prepare_data(config)
        return
    from dsdpo.data.prepare import wait_prepared

    wait_prepared(config, "train")
    wait_prepared(config, "eval")


def prepare_data(config: RunConfig) -> None:
    """Prepare both splits where missing and print what they hold."""
    from dsdpo.data.prepare import prepare, summary

    for prepared in (prepare(config, "train"), prepare(config, "eval")):
        if prepared is not None:
            print(summary(prepared), flush=True)


# --- the supervisor ---


def supervise(task: Task, cluster: ClusterRequest) -> int:
    """Run `task` on the accelerators asked for and return its exit code. Raises DsdpoError."""
    config = preflight(task.path, task.overrides, task.name, cluster, task.model)
    devices = _cuda_devices()
    check_device(config, devices > 0 or bool(cluster.hostfile))
    if devices and (cluster.num_accelerators or 1) > devices and not cluster.hostfile:
        raise ConfigError(f"--num_accelerators is {cluster.num_accelerators}, but {devices} are visible here")
    prepare_data(config)
    output_dir = Path(config.output_dir)
    clear_marks(output_dir)
    command = launch_command(task, cluster, devices, os.environ)
    environment = launch_environment(cluster, devices, os.environ)
    print(f"starting {task.name} on {_where(cluster, devices)}; stop with Ctrl-C or SIGTERM", flush=True)
    status = run_launcher(command, environment, output_dir)
    code = judge(task.name, output_dir, status)
    if code == 0:
        _finish(task, config)
    return code


def _finish(task: Task, config: RunConfig) -> None:
    """What follows a training that reached its end."""
    if task.name == "train" and config.plot_loss:
        from dsdpo.use.plots import plot

        plot(Path(config.output_dir))


def _cuda_devices() -> int:
    """Number of visible CUDA devices, without creating a CUDA context; without any, DeepSpeed is told so."""
    import torch

    devices = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    if not devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or importing it in this process warns of no GPU
    return devices


def _where(cluster: ClusterRequest, devices: int) -> str:
    if cluster.hostfile or cluster.include or cluster.exclude:
        return " ".join(
            filter(None, (cluster.hostfile, cluster.include, cluster.exclude and "all but", cluster.exclude))
        )
    ranks = cluster.num_accelerators or devices or 1
    return f"{ranks} {'GPU' if devices else 'CPU rank'}{'s' if ranks > 1 else ''}"


def launch_command(task: Task, cluster: ClusterRequest, devices: int, environment: Mapping[str, str]) -> list[str]:
    """The `deepspeed` launcher's command line; `devices`: number of visible CUDA devices, 0 on a CPU."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    command += ["--master_port", str(cluster.master_port or free_port())]
    if cluster.hostfile:
        command += ["--hostfile", cluster.hostfile]
    if cluster.include:
        command += ["--include", cluster.include]
    elif cluster.exclude:
        command += ["--exclude", cluster.exclude]
    elif visible := _visible(cluster, devices, environment):
        command += ["--include", "localhost:" + ",".join(visible[: cluster.num_accelerators])]
    elif cluster.num_accelerators or not (devices or cluster.hostfile):
        command += ["--num_accelerators", str(cluster.num_accelerators or 1)]
    return [*command, "--module", "dsdpo", *task.argv()]


def _visible(cluster: ClusterRequest, devices: int, environment: Mapping[str, str]) -> list[str]:
    """Ids in CUDA_VISIBLE_DEVICES on one node: given a mere number, the launcher would take GPUs 0 to N-1."""
    if not devices or cluster.hostfile or not environment.get("CUDA_VISIBLE_DEVICES"):
        return []
    return environment["CUDA_VISIBLE_DEVICES"].split(",")


def launch_environment(cluster: ClusterRequest, devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The ranks' environment: this interpreter's tools lead PATH; on a CPU, gloo and a share of the cores."""
    result = dict(environment)
    result.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of libraries, to libraries, once per rank
    result["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), result.get("PATH", os.defpath)])
    if _visible(cluster, devices, environment):
        del result["CUDA_VISIBLE_DEVICES"]  # said by --include; the launcher would only remark on it
    if not devices and not cluster.hostfile:
        result.setdefault("DS_ACCELERATOR", "cpu")
        result.setdefault("OMP_NUM_THREADS", str(max(1, cores() // (cluster.num_accelerators or 1))))
        result.setdefault("GLIBC_TUNABLES", KEEP_FREED_MEMORY)
    return result


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def clear_marks(output_dir: Path) -> None:
    """Forget how an earlier attempt was stopped and ended."""
    for name in (STOP_FILE, EXIT_FILE, PEER_EXIT_FILE):
        (output_dir / name).unlink(missing_ok=True)


def run_launcher(command: list[str], environment: Mapping[str, str], output_dir: Path) -> int:
    """Start the launcher in its own session, forward stop requests, wait, and end whatever it left behind.

    Returns:
        The launcher's exit status as subprocess gives it.

    Raises:
        KeyboardInterrupt: a second Ctrl-C; nothing is left running.
    """
    with _stop_requests(output_dir):
        launcher = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        try:
            return launcher.wait()
        finally:
            end_session(launcher.pid)
            launcher.wait()


@contextmanager
def _stop_requests(output_dir: Path) -> Iterator[None]:
    """Within, a stop signal becomes output_dir/STOP, and a second Ctrl-C raises KeyboardInterrupt."""
    interrupts = 0

    def on_signal(number: int, _: object) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        write_atomically(output_dir / STOP_FILE, signal.Signals(number).name)
        with suppress(OSError):  # the terminal may be gone
            print("stopping after this step; press Ctrl-C again to end at once", file=sys.stderr, flush=True)

    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_session(session: int) -> None:
    """Kill the launcher's process group: the launcher, the ranks and their helpers."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def judge(task: str, output_dir: Path, status: int) -> int:
    """The exit code of a task whose launcher ended with `status`.

    Raises:
        HangError: a rank was killed, or ended without a word.
    """
    if task == "train" and (output_dir / COMPLETED_FILE).exists():
        return 0
    code, message = _told(output_dir)
    # The launcher hands a rank's death by signal on as a negative number, which exit() wraps around.
    killed = status < 0 or status > 128
    if code in (None, 1) and killed:
        raise HangError(
            f"a rank was killed by {_signal_name(status)} during {task}; out of memory is the usual cause "
            "(see the lines above and the kernel's log): lower max_tokens_per_row or use a higher ZeRO stage"
        )
    if (code is None and status == 0) or (code == 0 and task == "train"):
        raise HangError(f"the ranks ended without finishing {task}; see the lines above")
    if code is None:
        print(f"{task} failed (launcher exit code {status}); see the lines above", file=sys.stderr)
        return 1
    if message.startswith("rank "):  # a peer's word; the main rank prints its own
        print(message, file=sys.stderr)
    return code


def _told(output_dir: Path) -> tuple[int | None, str]:
    """Exit code and message that the ranks left, None without any. Losing a peer is no cause: then its word counts."""
    code, message = _read_exit(output_dir / EXIT_FILE)
    if code in (None, 1):
        peer_code, peer_message = _read_exit(output_dir / PEER_EXIT_FILE)
        return (code, message) if peer_code is None else (peer_code, peer_message)
    return code, message


def _read_exit(path: Path) -> tuple[int | None, str]:
    if not path.exists():
        return None, ""
    said = json.loads(path.read_text())
    return int(said["code"]), str(said["message"])


def _signal_name(status: int) -> str:
    number = -status if status < 0 else min(256 - status, status - 128, key=abs)
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"a signal (status {status})"
