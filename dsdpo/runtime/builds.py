"""Kernels that DeepSpeed compiles in the first run that needs them: what a killed build leaves must not end later runs.

torch keeps each in a folder below TORCH_EXTENSIONS_DIR, where ninja builds it. A file `lock`, which the builder holds
open, keeps a build to one process: up to torch 2.14 while the file exists, from 2.15 on by flock, which ends with the
process.

ninja puts each compiler into a process group of its own: a kill of the run's group leaves compilers behind, which write
into the folder where the next run builds. An object file that one of them cut short while the other's ninja noted it
as done is never compiled again, and every later start fails to link it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import time
import uuid
from pathlib import Path
from threading import Thread
from typing import Any

_POLL_S = 0.2


def rebuild_broken_kernels() -> None:
    """Make DeepSpeed build a kernel once more, in an empty folder, where it failed on what an earlier build has left.

    Replaces OpBuilder.jit_load, which every kernel is loaded by.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    load = OpBuilder.jit_load
    if hasattr(load, "rebuilds"):
        return

    @functools.wraps(load)
    def load_or_rebuild(builder: Any, verbose: bool = True) -> Any:
        from torch.utils.cpp_extension import JIT_EXTENSION_VERSIONER, _get_build_directory

        began = time.time()
        try:
            return load(builder, verbose)
        except (RuntimeError, ImportError, OSError):
            if not clear_leftovers(Path(_get_build_directory(builder.name, False)), began):
                raise
        JIT_EXTENSION_VERSIONER.entries.pop(builder.name, None)  # torch takes it for built in this process
        return load(builder, verbose)

    load_or_rebuild.rebuilds = True  # type: ignore[attr-defined]
    OpBuilder.jit_load = load_or_rebuild


def clear_leftovers(folder: Path, began: float) -> bool:
    """Remove what a kernel's folder holds of earlier builds, unless another process builds there: then wait for it.

    The folder is renamed first: compilers that outlived their build go on writing in it, and not in the next one.

    Args:
        began: time of the build that failed.

    Returns:
        Whether another build may do better: False where the one that failed was the first in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    descriptor = _take(lock)
    if descriptor is None:
        return True
    try:
        files = [path for path in folder.iterdir() if path != lock]
        done_elsewhere = not files or any(p.suffix == ".so" and p.stat().st_mtime >= began for p in files)
        leftovers = any(path.stat().st_mtime < began for path in files)
        if done_elsewhere or not leftovers:
            if not _locks_by_flock():
                lock.unlink()
            return done_elsewhere
        aside = folder.with_name(f"{folder.name}.broken-{uuid.uuid4().hex[:8]}")
        folder.rename(aside)  # with our lock: who waits for it builds next
        folder.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(descriptor)
    return True


def _locks_by_flock() -> bool:
    from torch.utils import cpp_extension

    return not hasattr(cpp_extension, "FileBaton")


def _take(lock: Path) -> int | None:
    """Take torch's lock on a build: its descriptor. None: another process had it, and has ended its build now."""
    if _locks_by_flock():
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.close(descriptor)
            return None
        return descriptor
    try:
        return os.open(lock, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        while lock.exists():
            time.sleep(_POLL_S)
        return None


def end_stale_builds(patience: float = 600.0) -> Thread:
    """Wait, beside the rest, for DeepSpeed's kernels that another process builds, but not for one that was killed.

    Up to torch 2.14 nobody removes the lock of a killed build: every later run would wait for it for ever, before its
    first step. A build that goes on is none of ours unless torch comes to wait for it, so nobody waits here.

    Args:
        patience: seconds without a new object file after which the build is taken for a killed process's, unless a
            process of this machine holds its lock: a busy machine compiles for longer.

    Returns:
        What waits. It imports nothing: beside the main thread's import of distutils, which takes setuptools for its
        own, an import of setuptools would stop both for ever.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [] if _locks_by_flock() else [*root.glob("*/lock"), *root.glob("*/*/lock")]
    waits = Thread(target=_end_stale_builds, args=(locks, patience), name="stale builds", daemon=True)
    waits.start()
    return waits


def _end_stale_builds(locks: list[Path], patience: float) -> None:
    for lock in locks:
        while True:
            try:
                lock.stat()
                age = time.time() - max(path.stat().st_mtime for path in lock.parent.iterdir())
            except FileNotFoundError:
                break
            if age > patience and not _is_open_here(lock):
                lock.unlink(missing_ok=True)
                break
            time.sleep(_POLL_S if age <= patience else 10 * _POLL_S)


def _is_open_here(path: Path) -> bool:
    """Whether a process of this machine has a file open, of those that this user may look at."""
    target = os.path.realpath(path)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == target:
                return True
        except OSError:  # the process, or its descriptor, is gone, or another user's
            continue
    return False
