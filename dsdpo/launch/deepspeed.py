"""The `deepspeed` launcher as a child process: its command line and environment, stop requests while it runs, and an
end of everything that it started."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.errors import HangError, StopRequested
from dsdpo.launch.preflight import ClusterRequest
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.lock import RunLock, holder_is_gone
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import read_exit

# Activations are freed and allocated anew in every step. By default glibc hands them back to the kernel, and a tenth of
# a step on a CPU goes into page faults; this keeps up to 32 GiB, in huge pages where the kernel allows it.
KEEP_FREED_MEMORY = ":".join(
    f"glibc.malloc.{knob}" for knob in ("hugetlb=1", f"mmap_threshold={2**25}", f"trim_threshold={2**35}")
)

_AFTER_HANG_S = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Launch:
    """How to start the ranks: a command, its environment, and where they will run, in words.

    `ends_nicely`: the launcher ends its ranks on other nodes when it is asked to, as srun does.
    """

    command: list[str]
    environment: dict[str, str]
    where: str
    ends_nicely: bool = False


def launch_command(argv: list[str], cluster: ClusterRequest, devices: int, environment: Mapping[str, str]) -> list[str]:
    """The `deepspeed` launcher's command line.

    On this machine alone it is the part that each node runs: the one before it would only look the machine up, and take
    three seconds for that.

    Args:
        argv: arguments of `dsdpo` on each rank.
        devices: number of visible CUDA devices, 0 on a CPU.
    """
    port = str(cluster.master_port or free_port())
    if not (cluster.hostfile or cluster.include or cluster.exclude):
        ids = _visible(devices, environment) or [str(i) for i in range(devices or cluster.num_accelerators or 1)]
        here = {"localhost": ids[: cluster.num_accelerators]}
        return node_command(argv, here, 0, cluster.master_addr or "127.0.0.1", port)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    command += ["--master_port", port]
    if cluster.master_addr:
        command += ["--master_addr", cluster.master_addr]
    if cluster.hostfile:  # one host of many is still another machine, which the launcher would take for this one
        command += ["--hostfile", cluster.hostfile, "--force_multi"]
        argv = [for_pdsh(argument) for argument in argv]
    if cluster.include:
        command += ["--include", cluster.include]
    elif cluster.exclude:
        command += ["--exclude", cluster.exclude]
    elif cluster.num_accelerators:
        command += ["--num_accelerators", str(cluster.num_accelerators)]
    return [*command, "--module", "dsdpo", *argv]


def for_pdsh(argument: str) -> str:
    """What the launcher must be given for `argument` to arrive on another host.

    It puts double quotes around what has a space, and escapes such quotes in it (PDSHRunner.parse_user_args of 0.19.8);
    all else reaches pdsh, for which % is special, and the host's shell as it is.
    """
    argument = argument.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument)


def node_command(
    argv: list[str], nodes: Mapping[str, list[str]], node_rank: int, master_addr: str, master_port: str
) -> list[str]:
    """The command line of the part of the `deepspeed` launcher that runs on each node.

    Args:
        argv: arguments of `dsdpo` on each rank.
        nodes: ids of accelerators, one a rank, by node. Only this node's own ids matter here, and how many the others
            have.
    """
    world = base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += [f"--node_rank={node_rank}", f"--master_addr={master_addr}", f"--master_port={master_port}"]
    return [*command, "--no_local_rank", "--log_level=critical", "--module", "dsdpo", *argv]


def _visible(devices: int, environment: Mapping[str, str]) -> list[str]:
    """Ids in CUDA_VISIBLE_DEVICES on one node: given a mere number, the launcher would take GPUs 0 to N-1."""
    if not devices or not environment.get("CUDA_VISIBLE_DEVICES"):
        return []
    return environment["CUDA_VISIBLE_DEVICES"].split(",")


def launch_environment(cluster: ClusterRequest, devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The ranks' environment: this interpreter's tools lead PATH; on a CPU, gloo and a share of the cores."""
    result = dict(environment)
    result.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of libraries, to libraries, once per rank
    result["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), result.get("PATH", os.defpath)])
    if _visible(devices, environment) and not cluster.hostfile:
        del result["CUDA_VISIBLE_DEVICES"]  # said on the command line; the launcher would only remark on it
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


def run_launcher(launch: Launch, run_dir: RunDir, requests: StopRequests, lock: RunLock) -> int:
    """Start the launcher in its own session, wait, and end whatever it left behind.

    Returns:
        The launcher's exit status as subprocess gives it.

    Raises:
        KeyboardInterrupt: a second Ctrl-C. Nothing is left running here; ranks on other nodes end when they see that
            the lock was given back.
    """
    launcher = subprocess.Popen(launch.command, env=launch.environment, start_new_session=True)
    try:
        requests.launched = True
        lock.note(session=launcher.pid)
        return _wait(launcher, run_dir)
    finally:
        if launch.ends_nicely and launcher.poll() is None:
            launcher.terminate()
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout=_AFTER_HANG_S)
        end_session(launcher.pid)
        launcher.wait()


def _wait(launcher: subprocess.Popen[bytes], run_dir: RunDir) -> int:
    """The launcher's status; after a hang it is not waited for long, as it waits for the rank that hangs."""
    while True:
        try:
            return launcher.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            record = read_exit(run_dir.exit)
            if record is not None and record.code == HangError.exit_code:
                with suppress(subprocess.TimeoutExpired):
                    return launcher.wait(timeout=_AFTER_HANG_S)
                return HangError.exit_code


class StopRequests:
    """Within, a stop signal becomes output_dir/STOP, and a second Ctrl-C raises KeyboardInterrupt.

    Signals reach the main thread alone; a run that another thread starts is stopped by the file.

    Attributes:
        launched: whether there are ranks to see that file; before, a signal raises StopRequested.
        received: name of the first signal.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.launched = False
        self.received: str | None = None
        self._stop = run_dir.stop
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is not threading.main_thread():
            return self
        # nohup means SIGHUP; a batch script that ignores SIGUSR1 only means that it must not kill before this
        ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
        handled = [number for number in STOP_SIGNALS if number not in ignored - {signal.SIGUSR1}]
        self._before = {number: signal.signal(number, self._on_signal) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        self.received = self.received or signal.Signals(number).name
        if not self.launched:
            raise StopRequested("stopped on request before the first step; the same command begins again")
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self._stop.exists():  # its content says who was first to ask
            write_atomically(self._stop, self.received)
        with suppress(OSError):  # the terminal may be gone
            print("stopping after this step; press Ctrl-C again to end at once", file=sys.stderr, flush=True)


def end_leftovers(previous: dict[str, Any] | None) -> None:
    """Kill what a supervisor that was killed on this host has left running, before it writes to output_dir again."""
    session = (previous or {}).get("session")
    if session is None or not holder_is_gone(previous or {}):
        return
    import psutil

    def leftovers() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == session and "dsdpo" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    for process in leftovers():
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(leftovers(), timeout=10)


def end_session(session: int) -> None:
    """Kill the launcher's process group: the launcher, the ranks and their helpers."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
