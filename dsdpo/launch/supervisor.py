"""`dsdpo train` and its kin, started plainly.

This process prepares the data, starts the `deepspeed` launcher in a session of its own, here or on the nodes of a
hostfile or a SLURM job, turns stop signals into the file output_dir/STOP, waits, ends what is left over and derives the
exit code from what rank 0 wrote: the launcher's own exit code is no help, since it can be 0 after a rank was killed and
1 after a clean stop.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from dsdpo.config.schema import RunConfig
from dsdpo.errors import CheckpointError, ConfigError, DsdpoError, HangError, OutOfMemory, Problem, StopRequested
from dsdpo.launch.deepspeed import Launch, StopRequests, end_leftovers, launch_command, launch_environment, run_launcher
from dsdpo.launch.preflight import ClusterRequest, check_device, needs_ranks, preflight
from dsdpo.launch.slurm import Attempts, let_earlier_attempt_end, ranks_per_node, srun_command
from dsdpo.launch.ssh import check_hosts, forget_environment, leave_environment, slots, without_secrets
from dsdpo.launch.task import Task, clear_marks, finish, is_finished, prepare_data, resume_command
from dsdpo.runtime.env import Allocation, allocation, has_gpu_driver
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.row_limit import read_row_limit
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, read_exit

_KNOWN_STATUSES = (64, 65, 66, 70, 71, 72, 74, 75)


def supervise(task: Task, cluster: ClusterRequest) -> int:
    """Run `task` on the accelerators asked for and return its exit code. Raises DsdpoError."""
    job = None if cluster.hostfile or cluster.include or cluster.exclude else _allocation()
    if cluster.requeue and job is None:
        text = "--requeue works in a SLURM job that gives the nodes, such as that of slurm/train.sbatch"
        raise ConfigError(Problem("cluster", "requeue", text))
    ranks = _known_ranks(cluster, job)
    if ranks is None and needs_ranks(task.path, task.overrides):
        ranks = _number_of_ranks(cluster, job, _devices(cluster, job))
    config, zero = preflight(task.path, task.overrides, task.name, cluster, task.model, task.fresh, ranks)
    run_dir = RunDir(Path(config.output_dir))
    if task.fresh and job is not None and job.restarts and has_started_over(run_dir, job.job):
        task = replace(task, fresh=False)  # this attempt goes on
        config, zero = preflight(task.path, task.overrides, task.name, cluster, task.model, ranks=ranks)
    devices = _devices(cluster, job)
    check_device(config, devices > 0 or bool(cluster.hostfile), zero, ranks or _number_of_ranks(cluster, job, devices))
    if not task.fresh and is_finished(task, config):
        return 0
    attempts = Attempts(job, run_dir) if job is not None and cluster.requeue else None
    requests = StopRequests(run_dir)
    code = 1
    try:
        with requests:
            code = _run(task, cluster, config, job, attempts, devices, requests)
    except DsdpoError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 0  # ended at once, by hand
        raise
    finally:
        if attempts is not None:
            attempts.end(code, requests.received)
    if code == 0:
        finish(task, config)
    elif code == StopRequested.exit_code and task.name == "train":
        print(f"to go on:\n  {resume_command(task)}", flush=True)
    return code


def _run(
    task: Task,
    cluster: ClusterRequest,
    config: RunConfig,
    job: Allocation | None,
    attempts: Attempts | None,
    devices: int,
    requests: StopRequests,
) -> int:
    """Everything that holds the lock on output_dir. Returns the exit code; raises DsdpoError."""
    run_dir = RunDir(Path(config.output_dir))
    if attempts is not None:
        attempts.begin()
    if job is not None:
        let_earlier_attempt_end(run_dir, job)
    with RunLock.acquire(run_dir, f"dsdpo {task.name}") as lock:
        end_leftovers(lock.previous)
        if task.fresh:
            start_over(run_dir, task.confirmed, job.job if job is not None else None)
        elif is_finished(task, config):  # by the attempt that was waited for
            return 0
        clear_marks(task, config)
        prepare_data(config)
        limit, attempts_left = read_row_limit(run_dir), 2
        while True:
            attempts_left -= 1
            try:
                launch = _launch(task, cluster, job, devices, run_dir, lock.token)
                print(f"starting {task.name} on {launch.where}; stop with Ctrl-C or SIGTERM", flush=True)
                status = run_launcher(launch, run_dir, requests, lock)
            finally:
                forget_environment(run_dir)
            code = exit_code_from(task.name, run_dir, status)
            shorter = read_row_limit(run_dir)
            if code != OutOfMemory.exit_code or not attempts_left or shorter == limit or run_dir.stop.exists():
                return code
            print(f"once more from the beginning, with rows of at most {shorter} tokens", flush=True)
            clear_marks(task, config)


def _launch(
    task: Task, cluster: ClusterRequest, job: Allocation | None, devices: int, run_dir: RunDir, token: str
) -> Launch:
    """How to start the ranks here, on the nodes of a SLURM job, or on those of a hostfile, which are checked first.

    Raises:
        ConfigError, HangError: a host of the hostfile cannot be used.
    """
    argv = task.argv(token)
    if job is not None:
        ranks = ranks_per_node(cluster.num_accelerators, devices)
        command = srun_command(argv, job, ranks, run_dir, cluster, os.environ)
        on_nodes = replace(cluster, num_accelerators=ranks)
        nodes = f"{job.nodes} node{'s' if job.nodes > 1 else ''} ({job.node_list})"
        where = f"{_ranks(ranks, devices)} on each of {nodes} of job {job.job}"
        environment = launch_environment(on_nodes, devices, os.environ)
        if job.gpus_per_node is None and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
            environment["CUDA_VISIBLE_DEVICES"] = visible  # SLURM, which would set it on each node, does not
        return Launch(command, environment, where, ends_nicely=True)
    command = launch_command(argv, cluster, devices, os.environ)
    environment = launch_environment(cluster, devices, os.environ)
    if not cluster.hostfile:
        asked = " ".join(filter(None, (cluster.include, cluster.exclude and f"all but {cluster.exclude}")))
        return Launch(command, environment, asked or _ranks(cluster.num_accelerators or devices or 1, devices))
    hosts = list(slots(cluster.hostfile, cluster.include, cluster.exclude))
    check_hosts(hosts, task.file or ".", run_dir.path)
    leave_environment(run_dir, token, os.environ)
    return Launch(command, without_secrets(environment), ", ".join(hosts))


def _ranks(ranks: int, devices: int) -> str:
    return f"{ranks} {'GPU' if devices else 'CPU rank'}{'s' if ranks > 1 else ''}"


def _allocation() -> Allocation | None:
    """The SLURM job whose nodes are used. Raises ConfigError where srun is missing and there are several."""
    job = allocation()
    if job is None or shutil.which("srun"):
        return job
    if job.nodes > 1:
        text = f"job {job.job} has {job.nodes} nodes, but there is no srun on PATH to start ranks on them"
        raise ConfigError(Problem("cluster", "", text))
    return None


def _devices(cluster: ClusterRequest, job: Allocation | None) -> int:
    """Number of GPUs on each node; 0 without any, and for a hostfile, whose hosts know. Raises ConfigError."""
    if job is not None and (job.gpus_per_node is not None or not job.is_here):
        return job.gpus_per_node or 0
    if cluster.hostfile:
        return 0
    devices = _visible_devices() if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    if not devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or importing it in this process warns of no GPU
    elif (cluster.num_accelerators or 1) > devices:
        text = f"--num_accelerators is {cluster.num_accelerators}, but {devices} are visible here"
        raise ConfigError(Problem("too-few-devices", "num_accelerators", text))
    return devices


def _known_ranks(cluster: ClusterRequest, job: Allocation | None) -> int | None:
    """Number of ranks on all nodes, where it can be told without torch; None where the devices decide."""
    per_node = cluster.num_accelerators
    if job is not None:
        gpus = per_node or job.gpus_per_node or (None if has_gpu_driver() else 1)
        return None if gpus is None else gpus * job.nodes
    if cluster.hostfile or cluster.include or cluster.exclude:
        return None
    return per_node or (None if has_gpu_driver() else 1)


def _number_of_ranks(cluster: ClusterRequest, job: Allocation | None, devices: int) -> int | None:
    """The same where the devices decide; None where a choice among these does."""
    if job is not None:
        return job.nodes * (devices or 1)
    if cluster.hostfile:
        return sum(map(len, slots(cluster.hostfile, cluster.include, cluster.exclude).values()))
    return None if cluster.include or cluster.exclude else devices or 1


def _visible_devices() -> int:
    """Number of CUDA devices, as torch counts them; where there is no driver, nothing waits for torch's import."""
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def start_over(run_dir: RunDir, confirmed: bool, job: str | None = None) -> None:
    """Move what an earlier run has left in output_dir into a folder of its own there; nothing is deleted.

    Args:
        job: id of the SLURM job that does so, noted for its later attempts.

    Raises:
        CheckpointError: there is something, and nobody has confirmed.
    """
    found = run_dir.left_by_run()
    if found:
        _move_aside(run_dir, found, confirmed)
    if job is not None:
        write_atomically(run_dir.started_over, job)


def has_started_over(run_dir: RunDir, job: str) -> bool:
    """Whether an earlier attempt of a SLURM job has done so; one that ended before, at a held lock, has not."""
    marker = run_dir.started_over
    return marker.exists() and marker.read_text() == job


def _move_aside(run_dir: RunDir, found: list[Path], confirmed: bool) -> None:
    names = ", ".join(path.name for path in found[:6])
    if not confirmed and sys.stdin.isatty():
        confirmed = input(f"{run_dir} holds {names}; move that aside and begin again? [yes/no] ") == "yes"
    if not confirmed:
        raise CheckpointError(f"--fresh: {run_dir} holds {names}; add --yes to move that aside and begin again")
    aside = run_dir.replaced(time.strftime("%Y%m%d-%H%M%S"))
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    print(f"moved the earlier run to {aside}", flush=True)


def exit_code_from(task: str, run_dir: RunDir, status: int) -> int:
    """The exit code of a task whose launcher ended with `status`.

    Raises:
        HangError: a rank was killed, or ended without an exit record.
    """
    if task == "train" and run_dir.completed.exists():
        return 0
    record = _exit_record(run_dir)
    code = None if record is None else record.code
    if code in (None, 1) and status in _KNOWN_STATUSES:  # no file could be written, or another rank lost its peer first
        return status
    # The launcher hands a rank's death by signal on as a negative number, which exit() wraps around.
    killed = status < 0 or status > 128
    if code in (None, 1) and killed:
        name = _signal_name(status)
        cause = "another rank or node failed before, or the scheduler ended it; see the lines above"
        if name == "SIGKILL":
            cause = "unless the lines above name another cause, out of memory is the usual one (see the kernel's log): "
            cause += "lower max_tokens_per_row or use a higher ZeRO stage"
        raise HangError(f"a rank was killed by {name} during {task}; {cause}")
    if (code is None and status == 0) or (code == 0 and task == "train"):
        raise HangError(f"the ranks ended without finishing {task}; see the lines above")
    if record is None:
        print(f"{task} failed (launcher exit code {status}); see the lines above", file=sys.stderr)
        return 1
    if record.rank != 0:  # rank 0 has printed its own
        print(f"rank {record.rank}: {record.message}", file=sys.stderr)
    return record.code


def error_from(task: str, run_dir: RunDir, code: int) -> DsdpoError:
    """The error of a task that ended with an exit code other than 0, with what its rank said of it."""
    record = _exit_record(run_dir)
    said = record.message if record is not None and record.code == code else ""
    said = said or f"{task} ended with exit code {code}; see the lines above"
    kind = next((kind for kind in DsdpoError.__subclasses__() if kind.exit_code == code), DsdpoError)
    return ConfigError(Problem("rank", "", said)) if kind is ConfigError else kind(said)


def _exit_record(run_dir: RunDir) -> ExitRecord | None:
    """The exit record that counts; None where the ranks left none.

    Losing a peer is no cause, be it a call that failed or a hang that was noticed: then the peer's own record counts.
    """
    main = read_exit(run_dir.exit)
    if main is None or main.code in (1, HangError.exit_code):
        return read_exit(run_dir.peer_exit) or main
    return main


def _signal_name(status: int) -> str:
    number = -status if status < 0 else min(256 - status, status - 128, key=abs)
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"a signal (status {status})"
