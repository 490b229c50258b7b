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

# $1 the host name, $2 what stands for /etc/hosts. sshd wants its folder in /run. The last process is number 1 of the
# machine and inherits all orphans: as it ignores SIGCHLD, the kernel buries them.
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

# Daemons live where a user's PATH may not lead.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def find(program: str) -> str:
    """A program's path, or an empty string."""
    return shutil.which(program, path=PATH) or ""


def what_is_missing(programs: tuple[str, ...], trial: str, network: bool = False) -> str:
    """Why machines cannot be made here, or an empty string; `trial` is a shell command that must work on them."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    absent = [program for program in ("unshare", "nsenter", "setpriv", *programs) if not find(program)]
    if absent:
        return f"needs {', '.join(absent)} (`make cluster-packages`)"
    result = subprocess.run(
        [*_UNSHARE, *_network(network), "sh", "-c", f"mount -t tmpfs shm /dev/shm && {trial}"],
        env={**os.environ, "PATH": PATH},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        return f"needs namespaces and devices, which are not allowed here: {result.stderr.strip()}"
    return ""


def until(condition: Callable[[], object], what: str, timeout: float = 120) -> None:
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

    def __init__(self, name: str, hosts: Path, environment: dict[str, str], network: bool = False) -> None:
        self.name = name
        self._environment = environment
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
        line = (*enter, *BOUND, "env", "--chdir", str(cwd), *line)
        process = subprocess.Popen(line, **{"env": self._environment, **options})
        self._started.append(process)
        return process

    def run(self, *line: str, text: str = "", timeout: float = 60, **options: Any) -> str:
        """Output of a program that reads `text` and ends by itself, which must be well."""
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        process = self.start(*line, stdin=pipe, stdout=pipe, stderr=out, text=True, **options)
        try:
            output, _ = process.communicate(text, timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == 0, f"{line} on {self.name} ended with {process.returncode}: {output}"
        return output

    def overlay(self, path: Path, content: str) -> None:
        """This machine alone sees another content in a file, until it ends."""
        copy = 'copy=$(mktemp -p /run) && cp --preserve=mode "$1" "$copy" && cat > "$copy"'
        script = f'{copy} && mount --bind "$copy" "$1"'
        self.run("sh", "-c", script, "sh", str(path), text=content)

    def kill(self) -> None:
        """As if its power were cut. It may be dead already."""
        with suppress(psutil.NoSuchProcess):
            self._init.kill()
        self._shell.communicate(timeout=60)
        for process in self._started:
            process.wait(60)


def _network(own: bool) -> list[str]:
    return ["--net"] if own else []
