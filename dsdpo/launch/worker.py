"""One rank under a launcher: the `deepspeed` launcher, torchrun, accelerate or srun."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import DsdpoError, IOFailure, config_error
from dsdpo.launch.preflight import preflight, reload
from dsdpo.launch.rendezvous import rendezvous
from dsdpo.launch.ssh import take_environment
from dsdpo.launch.task import Task, clear_marks, finish, is_finished, prepare_data, wait_merged
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, write_exit, write_peer_exit


def join(task: Task, mesh: Mesh, token: str | None) -> int:
    """Take this rank's place. Raises DsdpoError; the main rank's cause is in output_dir/EXIT as well.

    Args:
        token: of the supervisor's lock; None without one: the main rank then takes the lock itself.
    """
    supervised = token is not None
    if not os.environ.get("PYTHONWARNINGS"):  # a supervisor sets it, for the launcher too
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, to libraries, once per rank
    config, zero, trouble = _read(task, mesh, supervised)
    run_dir = None if config is None else RunDir(Path(config.output_dir))
    if run_dir is not None and token is not None:
        take_environment(run_dir, token)
    if config is not None and not supervised and is_finished(task, config):
        return 0
    if config is not None and not supervised and mesh.is_main:
        token = _take_lock(task, config)
    try:
        with _no_garbage_collection():
            meeting = rendezvous(mesh, config, zero, trouble, token)
        assert config is not None and zero is not None, "a rank without a config has raised its trouble"
        if not supervised:
            _prepare_as_rank(config, mesh)
        with _no_garbage_collection():
            from dsdpo.train.tasks import run_task
        gc.freeze()
        run_task(config, zero, task.name, task.model, token)
        del meeting
    except DsdpoError as error:
        if run_dir is not None:
            _write_exit(run_dir, mesh, error)
        raise
    if mesh.is_main and not supervised:
        finish(task, config)
    return 0


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Around imports: collections would take a sixth of their time, and free nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read(task: Task, mesh: Mesh, supervised: bool) -> tuple[RunConfig | None, ZeroConfig | None, DsdpoError | None]:
    """The config and its DeepSpeed JSON, or what is wrong with them on a node other than rank 0's.

    That must be told at the meeting.

    Raises:
        DsdpoError: what is wrong on rank 0's.
    """
    try:
        if supervised:
            return *reload(task.path, task.overrides, mesh.world_size), None
        if task.fresh:
            text = "--fresh works where `dsdpo train` is started plainly; here, empty output_dir instead"
            raise config_error("fresh", "--fresh", text)
        return *preflight(task.path, task.overrides, task.name, model=task.model, ranks=mesh.world_size), None
    except DsdpoError as error:
        if mesh.is_main:
            raise
        return None, None, error


def _take_lock(task: Task, config: RunConfig) -> str:
    """Without a supervisor the main rank holds the lock, until the process ends. Returns its token."""
    lock = RunLock.acquire(RunDir(Path(config.output_dir)), f"dsdpo {task.name}")
    atexit.register(lock.release)
    clear_marks(task, config)
    return lock.token


def _write_exit(run_dir: RunDir, mesh: Mesh, error: DsdpoError) -> None:
    """Write this rank's exit record for the supervisor, unless `run_task` has written it."""
    record = ExitRecord(error.exit_code, str(error), mesh.rank)
    with suppress(OSError, IOFailure):
        if not mesh.is_main:
            write_peer_exit(run_dir, record)
        elif not run_dir.exit.exists():
            write_exit(run_dir, record)


def _prepare_as_rank(config: RunConfig, mesh: Mesh) -> None:
    """Without a supervisor the main rank prepares; the others wait for its files, not in a collective."""
    if mesh.is_main:
        prepare_data(config)
        return
    from dsdpo.data.prepare import wait_prepared

    wait_merged(config)
    wait_prepared(config, "train")
    wait_prepared(config, "eval")
