"""`dsdpo checkpoints`: what a run has saved, whether it is whole, and away with what is not needed."""

from __future__ import annotations

import shutil
import time

from dsdpo.checkpoint.commit import MANIFEST, Checkpoint, checkpoints, leftovers, retain, verify
from dsdpo.errors import CheckpointError, ConfigError, Problem
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def show(run_dir: RunDir, verify_all: bool, prune: int | None) -> int:
    """Print a run's checkpoints, the newest first.

    Args:
        verify_all: read and hash every file; else their sizes are looked at.
        prune: how many whole ones stay, and nothing else; None removes nothing.

    Returns:
        The exit code: that of a CheckpointError when one of those that stay is damaged, else 0.

    Raises:
        CheckpointError: there are none.
        IOFailure: a job uses the folder, when something is to be removed.
    """
    if prune is not None and prune < 2:
        text = f"--prune is {prune}; allowed: at least 2, so that one damaged checkpoint ends no run"
        raise ConfigError(Problem("value", "--prune", text))
    if prune is not None:
        _prune(run_dir, prune)
    found = checkpoints(run_dir)
    if not found and not leftovers(run_dir):
        raise CheckpointError(f"there are no checkpoints in {run_dir.checkpoints}; give the output_dir of a run")
    problems = {checkpoint.path: verify(checkpoint) if verify_all else checkpoint.problem for checkpoint in found}
    for checkpoint in found:
        print(_line(checkpoint, problems[checkpoint.path], "verified" if verify_all else "whole by size"))
    for path in leftovers(run_dir):
        print(f"{path.name}: not a checkpoint; --prune removes it")
    return CheckpointError.exit_code if any(problems.values()) else 0


def _prune(run_dir: RunDir, keep: int) -> None:
    with RunLock.acquire(run_dir, "dsdpo checkpoints --prune"):
        for path in retain(run_dir, keep, None):
            print(f"removed {path}")
        for path in leftovers(run_dir):
            shutil.rmtree(path, ignore_errors=True)
            print(f"removed {path}")


def _line(checkpoint: Checkpoint, problem: str, fine: str) -> str:
    manifest = checkpoint.path / MANIFEST
    age = f"{_age(time.time() - manifest.stat().st_mtime)} ago" if manifest.exists() else "?"
    ranks = checkpoint.manifest.get("world_size", "?")
    state = f"NOT USABLE: {problem}" if problem else fine
    return f"step {checkpoint.step:>8}  {_size(checkpoint.size):>10}  {age:>12}  {ranks} ranks  {state}"


def _size(count: float) -> str:
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _age(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
