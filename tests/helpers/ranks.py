"""Run a function on several real ranks: processes with gloo between them.

A fresh interpreter imports torch, deepspeed and transformers for 6 to 8 s of CPU time. So ranks are forked by a server
that has imported them (`tests.helpers.preload`), one server for each pytest process, and gone with it. Where the start
of an interpreter is part of what is tested, `run_ranks(…, fresh=True)` starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_OUTPUT_END = 3000
_PEERS_S = 60  # that peers of a rank that failed have to fail too
_starting = threading.Lock()


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that a launcher would set."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def run_ranks(target: str, world_size: int, *args: Any, timeout: float = 900, fresh: bool = False) -> list[Any]:
    """Call `module:function`(*args) on every rank; returns what each rank returned.

    Args:
        target: `module:function`, importable in a rank.
        world_size: number of ranks.
        args: for the function; they are pickled.
        timeout: seconds for all of it.
        fresh: start each rank as a new interpreter, as a launcher does.

    Raises:
        AssertionError: a rank failed, or was not done in time; with the end of each rank's output.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((target, args)))
        environments = [rank_environment(rank, world_size, port) for rank in range(world_size)]
        start = _start_fresh if fresh else _fork
        codes = _codes([start(folder, rank, environment) for rank, environment in enumerate(environments)], timeout)
        logs = [(folder / f"log-{rank}").read_text(errors="replace")[-_OUTPUT_END:] for rank in range(world_size)]
        assert codes == [0] * world_size, f"ranks ended with {codes} (None: killed after {timeout:g} s):\n" + (
            "\n---\n".join(logs)
        )
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def run_commands(
    *calls: tuple[list[str], dict[str, str]], timeout: float = 900, peers: float = _PEERS_S
) -> list[tuple[int | None, str]]:
    """Run `dsdpo` in processes beside each other.

    Args:
        calls: arguments and environment of each; with that of a rank (`rank_environment`), it is one.
        timeout: seconds for all of it.
        peers: seconds that the others have when one has failed.

    Returns:
        Exit code and output of each. What a signal ended has its negative number, what had to be killed None.
    """
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name, f"log-{number}") for number in range(len(calls))]
        processes = [_forked(_command, log, environment, line) for log, (line, environment) in zip(logs, calls)]
        codes = _codes(processes, timeout, peers)
        return list(zip(codes, [log.read_text(errors="replace") for log in logs]))


def run_as_ranks(world_size: int, *line: str) -> tuple[int | None, str]:
    """Run `dsdpo` with these arguments on each rank of a group, as under a user's own launcher.

    Returns the main rank's exit code, and all output. As launchers do, it ends the others when one has failed.
    """
    port = free_port()
    calls = [(list(line), rank_environment(rank, world_size, port)) for rank in range(world_size)]
    ends = run_commands(*calls, peers=5)
    return ends[0][0], "\n---\n".join(output for _, output in ends)


def imports_of_threads() -> list[str]:
    """Grows by every module that another thread than the main one looks for from now on, in this process.

    There should be none: while the main thread imports distutils, which takes setuptools for its own, another thread's
    import of setuptools stops both for ever.
    """
    found = []

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "import" and threading.current_thread() is not threading.main_thread():
            found.append(f"{threading.current_thread().name}: {args[0]}")

    sys.addaudithook(note)
    return found


# --- processes ---


class _Fresh:
    """A rank in a new interpreter, with the methods of a multiprocessing.Process that are used here."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.kill = process.kill

    def join(self, timeout: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()


def _start_fresh(folder: Path, rank: int, environment: dict[str, str]) -> _Fresh:
    line = [sys.executable, "-m", "tests.helpers.ranks", str(folder), str(rank)]
    with (folder / f"log-{rank}").open("wb") as log:
        return _Fresh(subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))


def _fork(folder: Path, rank: int, environment: dict[str, str]) -> Any:
    return _forked(_call, folder / f"log-{rank}", environment, folder, rank)


def _forked(function: Callable[..., None], log: Path, environment: dict[str, str], *args: Any) -> Any:
    """A process, forked by this pytest's server, that calls function(*args)."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_as_rank, args=(function, log, environment, *args), name=log.name)
    with _starting, _server_environment():
        context.set_forkserver_preload(["tests.helpers.preload"])
        forkserver.ensure_running()
        process.start()
    return process


@contextlib.contextmanager
def _server_environment() -> Iterator[None]:
    """What the server must find when it starts: the folder, one thread, the accelerator that deepspeed looks for."""
    needs = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow starts one on import
    }
    before, cwd = {name: os.environ.get(name) for name in needs}, Path.cwd()
    os.environ.update(needs)
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(cwd)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _codes(processes: list[Any], timeout: float, peers: float = _PEERS_S) -> list[int | None]:
    """The exit code of each process, all of which have ended then; None for one that had to be killed.

    Args:
        processes: of one group.
        timeout: seconds for all of them.
        peers: seconds that the others have when one has failed.
    """
    deadline, has_failed = time.monotonic() + timeout, False
    try:
        while None in (codes := [process.exitcode for process in processes]) and time.monotonic() < deadline:
            if any(codes) and not has_failed:
                has_failed, deadline = True, min(deadline, time.monotonic() + peers)
            time.sleep(0.02)
        return codes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(60)


# --- inside a rank ---


def _as_rank(function: Callable[..., None], log: Path, environment: dict[str, str], *args: Any) -> None:
    """Make a forked process what a new interpreter in this environment would be, and call the function."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    assert "tests.helpers.preload" in sys.modules, "the server could not import tests.helpers.preload"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [str(Path(__file__)), log.name]
    multiprocessing.set_start_method(None, force=True)  # it would be forkserver
    _seed_anew()
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a child without them


def _seed_anew() -> None:
    """From the system's entropy, as on import: the server's generators would give every rank the same numbers."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.seed()


def _call(folder: Path, rank: int) -> None:
    target, args = pickle.loads((folder / "call").read_bytes())
    module, function = target.split(":")
    imported = imports_of_threads()
    result = getattr(importlib.import_module(module), function)(*args)
    assert not imported, f"threads import nothing, but: {', '.join(imported)}"
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))


def _command(line: list[str]) -> None:
    from dsdpo.cli import main

    sys.exit(main(line))


if __name__ == "__main__":
    _call(Path(sys.argv[1]), int(sys.argv[2]))
    gc.freeze()  # as `dsdpo` ends
