"""`dsdpo train` and its kin, started plainly or as one rank.

Started plainly, this process prepares the data, starts the `deepspeed` launcher in a session of its own,
turns stop signals into the file output_dir/STOP, waits, ends what is left over and derives the exit code from
what rank 0 wrote: the launcher's own exit code is no help, since it can be 0 after a rank was killed and 1
after a clean stop.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dsdpo.config.schema import RunConfig
from dsdpo.dist import Allocation, Ranks, allocation, launched
from dsdpo.errors import CheckpointError, ConfigError, DsdpoError, HangError, IOFailure
from dsdpo.lock import LOCK_FILE, RunLock
from dsdpo.train.stop import COMPLETED_FILE, EXIT_FILE, STOP_FILE, read_exit, write_exit
from dsdpo.use.launcher import StopRequests, end_leftovers, launch_command, launch_environment, run_launcher
from dsdpo.use.preflight import ClusterRequest, check_device, preflight, reload
from dsdpo.use.rendezvous import meet
from dsdpo.use.slurm import begin_attempt, let_earlier_attempt_end, put_back, ranks_per_node, srun_command

PEER_EXIT_FILE = "EXIT_PEER"
_TOLD_BY_STATUS = (64, 65, 66, 70, 71, 74, 75)
_REPLACED = "replaced-"


@dataclass(frozen=True)
class Task:
    """What to do (`train`, `reference` or `eval`), on which YAML, with which overrides and `--model`.

    `fresh` trains from the beginning though output_dir holds a run, which `confirmed` says without asking.
    """

    name: str
    path: str
    overrides: list[str]
    model: str | None = None
    fresh: bool = False
    confirmed: bool = False

    def argv(self, token: str) -> list[str]:
        """The arguments that make a rank do this under a supervisor that holds the lock `token`."""
        model = ["--model", self.model] if self.model else []
        return [self.name, self.path, *model, "--supervised", token, *self.overrides]


# --- one rank under a launcher ---


def join(task: Task, ranks: Ranks, token: str | None) -> int:
    """Take this rank's place. Raises DsdpoError; the main rank's cause is in output_dir/EXIT as well.

    Args:
        token: of the supervisor's lock; None without one: the main rank then takes the lock itself.
    """
    supervised = token is not None
    config, trouble = _read(task, ranks, supervised)
    if config is not None and not supervised and _is_finished(task, config):
        return 0
    if config is not None and not supervised and ranks.is_main:
        token = _take_lock(task, Path(config.output_dir))
    try:
        meeting = meet(ranks, config, trouble, token)
        assert config is not None, "a rank without a config has raised its trouble"
        if not supervised:
            _prepare_as_rank(config, ranks)
        from dsdpo.train.tasks import run

        run(config, task.name, task.model, token)
        del meeting
    except DsdpoError as error:
        if config is not None:
            _tell(Path(config.output_dir), ranks, error)
        raise
    if ranks.is_main and not supervised:
        _finish(task, config)
    return 0


def _read(task: Task, ranks: Ranks, supervised: bool) -> tuple[RunConfig | None, DsdpoError | None]:
    """The config, or what is wrong with it on a node other than rank 0's, which must be told at the meeting.

    Raises:
        DsdpoError: what is wrong on rank 0's.
    """
    try:
        if supervised:
            return reload(task.path, task.overrides), None
        if task.fresh:
            raise ConfigError("--fresh works where `dsdpo train` is started plainly; here, empty output_dir instead")
        return preflight(task.path, task.overrides, task.name, model=task.model), None
    except DsdpoError as error:
        if ranks.is_main:
            raise
        return None, error


def _take_lock(task: Task, output_dir: Path) -> str:
    """Without a supervisor the main rank holds the lock, until the process ends. Returns its token."""
    lock = RunLock.acquire(output_dir, f"dsdpo {task.name}")
    atexit.register(lock.release)
    clear_marks(output_dir)
    return lock.token


def _tell(output_dir: Path, ranks: Ranks, error: DsdpoError) -> None:
    """Leave a word for the supervisor: where `run` was not reached yet, nobody else does."""
    if not ranks.is_main:
        _tell_as_peer(output_dir, ranks, error)
    elif not (output_dir / EXIT_FILE).exists():
        with suppress(IOFailure):
            write_exit(output_dir, error.exit_code, str(error))


def _tell_as_peer(output_dir: Path, ranks: Ranks, error: DsdpoError) -> None:
    """Leave what happened to this rank alone, such as a full disk; the first of several ranks to do so wins."""
    with suppress(OSError), (output_dir / PEER_EXIT_FILE).open("x") as stream:
        json.dump({"code": error.exit_code, "message": f"rank {ranks.rank}: {error}"}, stream)


def _prepare_as_rank(config: RunConfig, ranks: Ranks) -> None:
    """Without a supervisor the main rank prepares; the others wait for its files, not in a collective."""
    if ranks.is_main:
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
    config = preflight(task.path, task.overrides, task.name, cluster, task.model, task.fresh)
    job = None if cluster.hostfile or cluster.include or cluster.exclude else _allocation()
    if cluster.requeue and job is None:
        raise ConfigError("--requeue works in a SLURM job that gives the nodes, such as that of slurm/train.sbatch")
    devices = (job.gpus_per_node or 0) if job else _cuda_devices()
    check_device(config, devices > 0 or bool(cluster.hostfile))
    if devices and (cluster.num_accelerators or 1) > devices and not cluster.hostfile and not job:
        raise ConfigError(f"--num_accelerators is {cluster.num_accelerators}, but {devices} are visible here")
    if not task.fresh and _is_finished(task, config):
        return 0
    output_dir = Path(config.output_dir)
    requests = StopRequests(output_dir)
    code = 1
    try:
        code = _run(task, cluster, config, job, devices, requests)
    except DsdpoError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 0  # ended at once, by hand
        raise
    finally:
        if cluster.requeue and job is not None:
            put_back(job, output_dir, code, requests.received)
    if code == 0:
        _finish(task, config)
    return code


def _run(
    task: Task, cluster: ClusterRequest, config: RunConfig, job: Allocation | None, devices: int, requests: StopRequests
) -> int:
    """Everything that holds the lock on output_dir. Returns the exit code; raises DsdpoError."""
    output_dir = Path(config.output_dir)
    if job is not None:
        let_earlier_attempt_end(output_dir, job)
    with RunLock.acquire(output_dir, f"dsdpo {task.name}") as lock, requests:
        end_leftovers(lock.previous)
        if task.fresh:
            start_over(output_dir, task.confirmed)
        clear_marks(output_dir)
        if job is not None and cluster.requeue:
            begin_attempt(output_dir, job)
        prepare_data(config)
        argv = task.argv(lock.token)
        if job is not None:
            ranks = ranks_per_node(job, cluster.num_accelerators)
            command = srun_command(argv, job, ranks, output_dir, cluster.master_port, os.environ)
            cluster = replace(cluster, num_accelerators=ranks)
        else:
            command = launch_command(argv, cluster, devices, os.environ)
        environment = launch_environment(cluster, devices, os.environ)
        print(f"starting {task.name} on {_where(cluster, job, devices)}; stop with Ctrl-C or SIGTERM", flush=True)
        status = run_launcher(command, environment, output_dir, requests, lock)
        return judge(task.name, output_dir, status)


def _allocation() -> Allocation | None:
    """The SLURM job whose nodes are used. Raises ConfigError where srun is missing and there are several."""
    job = allocation()
    if job is None or shutil.which("srun"):
        return job
    if job.nodes > 1:
        raise ConfigError(f"job {job.job} has {job.nodes} nodes, but there is no srun on PATH to start ranks on them")
    return None


def _is_finished(task: Task, config: RunConfig) -> bool:
    """Whether this training has ended well before; said once."""
    if task.name != "train" or not (Path(config.output_dir) / COMPLETED_FILE).exists():
        return False
    ranks = launched()
    if ranks is None or ranks.is_main:
        print(f"{config.output_dir} holds this run, finished: nothing to do. --fresh trains it again", flush=True)
    return True


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


def _where(cluster: ClusterRequest, job: Allocation | None, devices: int) -> str:
    if cluster.hostfile or cluster.include or cluster.exclude:
        return " ".join(
            filter(None, (cluster.hostfile, cluster.include, cluster.exclude and "all but", cluster.exclude))
        )
    ranks = cluster.num_accelerators or devices or 1
    kind = f"{ranks} {'GPU' if devices else 'CPU rank'}{'s' if ranks > 1 else ''}"
    if job is None:
        return kind
    return f"{kind} on each of {job.nodes} nodes ({job.node_list}) of job {job.job}, attempt {job.restarts + 1}"


def clear_marks(output_dir: Path) -> None:
    """Forget how an earlier attempt was stopped and ended."""
    for name in (STOP_FILE, EXIT_FILE, PEER_EXIT_FILE):
        (output_dir / name).unlink(missing_ok=True)


def start_over(output_dir: Path, confirmed: bool) -> None:
    """Move what an earlier run has left in output_dir into a folder of its own there; nothing is deleted.

    Raises:
        CheckpointError: there is something, and nobody has confirmed.
    """
    found = [path for path in sorted(output_dir.iterdir()) if not path.name.startswith((".", LOCK_FILE, _REPLACED))]
    if not found:
        return
    names = ", ".join(path.name for path in found[:6])
    if not confirmed and sys.stdin.isatty():
        confirmed = input(f"{output_dir} holds {names}; move that aside and begin again? [yes/no] ") == "yes"
    if not confirmed:
        raise CheckpointError(f"--fresh: {output_dir} holds {names}; add --yes to move that aside and begin again")
    aside = output_dir / f"{_REPLACED}{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    print(f"moved the earlier run to {aside}", flush=True)


def judge(task: str, output_dir: Path, status: int) -> int:
    """The exit code of a task whose launcher ended with `status`.

    Raises:
        HangError: a rank was killed, or ended without a word.
    """
    if task == "train" and (output_dir / COMPLETED_FILE).exists():
        return 0
    code, message = _told(output_dir)
    if code in (None, 1) and status in _TOLD_BY_STATUS:  # no file could be written, or another rank lost its peer first
        return status
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
    code, message = read_exit(output_dir / EXIT_FILE)
    if code in (None, 1):
        peer_code, peer_message = read_exit(output_dir / PEER_EXIT_FILE)
        return (code, message) if peer_code is None else (peer_code, peer_message)
    return code, message


def _signal_name(status: int) -> str:
    number = -status if status < 0 else min(256 - status, status - 128, key=abs)
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"a signal (status {status})"
