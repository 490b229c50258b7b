"""Run a function on several real ranks: processes with gloo between them."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


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


def run_ranks(target: str, world_size: int, *args: Any, timeout: float = 600) -> list[Any]:
    """Call `module:function`(*args) on every rank; returns what each rank returned.

    Raises:
        AssertionError: a rank failed; with the end of its output.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((target, args)))
        processes = []
        for rank in range(world_size):
            with Path(folder, f"log-{rank}").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.helpers.ranks", folder, str(rank)],
                        cwd=ROOT,
                        env=rank_environment(rank, world_size, port),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        logs = [Path(folder, f"log-{rank}").read_text(errors="replace")[-3000:] for rank in range(world_size)]
        assert not any(codes), f"ranks ended with {codes}:\n" + "\n---\n".join(logs)
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


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


def _main(folder: str, rank: str) -> None:
    target, args = pickle.loads(Path(folder, "call").read_bytes())
    module, function = target.split(":")
    imported = imports_of_threads()
    result = getattr(importlib.import_module(module), function)(*args)
    assert not imported, f"threads import nothing, but: {', '.join(imported)}"
    Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
    gc.freeze()  # as `dsdpo` ends


if __name__ == "__main__":
    _main(*sys.argv[1:])
