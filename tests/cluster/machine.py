"""A machine for tests: Linux namespaces that hang on one process, and are gone without a trace when it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

# The kernel ends it with the test process that started it, however that one ends.
BOUND = ["setpriv", "--pdeathsig", "KILL"]
_UNSHARE = ["unshare", "--fork", "--kill-child", "--mount-proc", "--pid", "--mount", "--uts"]

# $1 the host name, $2 what stands for /etc/hosts. The last process is number 1 of the machine and inherits all
# orphans: as it ignores SIGCHLD, the kernel buries them.
_BOOT = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mkdir /run/sshd
echo up
exec env --ignore-signal=CHLD sleep infinity > /dev/null
"""


def find(program: str) -> str:
    """A program's path; daemons live where a user's PATH may not lead. Empty if it is not installed."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""


def what_is_missing(*programs: str, network: bool = False) -> str:
    """Why machines cannot be made here, or an empty string."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    absent = [program for program in ("unshare", "nsenter", "setpriv", *programs) if not find(program)]
    if absent:
        return f"needs {', '.join(absent)}, which `make cluster-packages` installs"
    trial = subprocess.run(
        [*_UNSHARE, *_network(network), "mount", "-t", "tmpfs", "trial", "/dev/shm"], capture_output=True, text=True
    )
    return f"needs namespaces, which are not allowed here: {trial.stderr.strip()}" if trial.returncode else ""


def until(condition: Callable[[], object], what: str, timeout: float = 60) -> None:
    """Look until something is so; fail with `what` when it is not after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s for {what}")
        time.sleep(0.1)


def programs_in(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """What runs on a machine behind a `Machine.start`: nsenter passes on exit codes, but no signals."""
    return psutil.Process(process.pid).children()


class Machine:
    """Processes, mounts, a host name, /dev/shm and /run of its own, and a network if asked for; files are ours.

    Whatever runs on it, daemons too, descends from its process 1, with which the kernel kills all.
    """

    def __init__(self, name: str, hosts: Path, network: bool = False) -> None:
        self.name = name
        self._network = _network(network)
        self._shell = subprocess.Popen(
            [*BOUND, *_UNSHARE, *self._network, "sh", "-c", _BOOT, "sh", name, str(hosts)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._shell.stdout
        said = self._shell.stdout.readline()
        assert said == "up\n", f"machine {name} did not start: {said}{self._shell.stdout.read()}"
        (self._init,) = psutil.Process(self._shell.pid).children()
        self.pid = self._init.pid
        self._started: list[subprocess.Popen[Any]] = []

    def start(self, *line: str, cwd: Path | str = "/", **options: Any) -> subprocess.Popen[Any]:
        """A program on this machine; `options` as for Popen. Killing what this returns kills the program too."""
        enter = ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--uts", *self._network, "--"]
        # Entering the mounts leads to their root folder.
        process = subprocess.Popen([*enter, *BOUND, "env", "--chdir", str(cwd), *line], **options)
        self._started.append(process)
        return process

    def run(self, *line: str, timeout: float = 60, **options: Any) -> str:
        """Output of a program that ends by itself, which must be well."""
        process = self.start(*line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == 0, f"{line} on {self.name} ended with {process.returncode}: {output}"
        return output

    def kill(self) -> None:
        """As if its power were cut. It may be dead already."""
        with suppress(psutil.NoSuchProcess):
            self._init.kill()
        self._shell.communicate(timeout=60)
        for process in self._started:
            process.wait(60)


def _network(own: bool) -> list[str]:
    return ["--net"] if own else []
