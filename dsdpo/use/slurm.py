"""`dsdpo train` inside a SLURM job: one task a node through srun, and back into the queue when the run can go on.

The batch script replaces itself with `dsdpo train --requeue`, so that the scheduler's warning reaches this process.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.dist import Allocation
from dsdpo.errors import ConfigError, HangError, IOFailure, StopRequested
from dsdpo.files import write_atomically
from dsdpo.lock import EXPIRED_S, living_holder
from dsdpo.train.stop import STOP_FILE
from dsdpo.use.preflight import ClusterRequest

ATTEMPTS_FILE = "attempts.jsonl"
_MOST = 3  # attempts that end where they began
# Ends after which another attempt can do better: a rank died, a file system was away, an error outside of dsdpo.
_MAY_PASS = (1, HangError.exit_code, IOFailure.exit_code)
_SCHEDULERS_SIGNAL = "SIGUSR1"


# --- the ranks ---


def ranks_per_node(job: Allocation, wanted: int | None) -> int:
    """One for each GPU that SLURM gave, or for each node without any.

    Args:
        wanted: --num_accelerators.

    Raises:
        ConfigError: more than there are GPUs.
    """
    if wanted and job.gpus_per_node and wanted > job.gpus_per_node:
        raise ConfigError(f"--num_accelerators is {wanted}, but SLURM gave {job.gpus_per_node} GPUs on each node")
    return wanted or job.gpus_per_node or 1


def srun_command(
    argv: list[str],
    job: Allocation,
    ranks: int,
    output_dir: Path,
    cluster: ClusterRequest,
    environment: Mapping[str, str],
) -> list[str]:
    """srun's command line: one task a node, which becomes that node's `deepspeed` launcher.

    Args:
        argv: arguments of `dsdpo` on each rank.
        ranks: on each node.
        cluster: --master_addr and --master_port, which the job gives otherwise.
        environment: DSDPO_SRUN_ARGS, further arguments of srun, such as --container-image=…; DSDPO_PYTHON, the
            interpreter on the nodes, where it is not this one.
    """
    command = ["srun", f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1"]
    command += ["--cpu-bind=none"]  # or a site's default binds all of a node's ranks to the task's one core
    command += ["--kill-on-bad-exit=1", "--wait=60"]  # a node that ended takes the others along
    command += shlex.split(environment.get("DSDPO_SRUN_ARGS", ""))
    command += [environment.get("DSDPO_PYTHON", sys.executable), "-m", "dsdpo.use.node"]
    command += ["--nodes", str(job.nodes), "--ranks", str(ranks)]
    command += ["--master_addr", cluster.master_addr or job.address]
    command += ["--master_port", str(cluster.master_port or job.port)]
    return [*command, "--logs", str((output_dir / "logs").absolute()), "--", *argv]


# --- the queue ---


@dataclass(frozen=True)
class Attempt:
    """A start of a job's script: how often it was put back before, and the step of the newest checkpoint then."""

    job: str
    restarts: int
    step: int


def begin_attempt(output_dir: Path, job: Allocation) -> int:
    """Note that this attempt begins.

    Returns:
        How many of the job's attempts in a row, with this one, began at the same step.

    Raises:
        HangError: too many; SLURM itself puts a job back after the failure of a node.
    """
    attempts = [*_attempts(output_dir), Attempt(job.job, job.restarts, _newest_step(output_dir))]
    write_atomically(output_dir / ATTEMPTS_FILE, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))
    count = _count(attempts)
    if count > _MOST:
        raise HangError(_loop(attempts[-1].step, count - 1))
    return count


def _attempts(output_dir: Path) -> list[Attempt]:
    path = output_dir / ATTEMPTS_FILE
    return [Attempt(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _count(attempts: list[Attempt]) -> int:
    last = attempts[-1]
    others = [i for i, attempt in enumerate(reversed(attempts)) if (attempt.job, attempt.step) != (last.job, last.step)]
    return others[0] if others else len(attempts)


def _newest_step(output_dir: Path) -> int:
    return max((found.step for found in checkpoints(output_dir) if not found.problem), default=0)


def _loop(step: int, count: int) -> str:
    where = f"after step {step}" if step else "at the beginning"
    return (
        f"{count} attempts of this job began {where} and ended without a new checkpoint: not put back into the queue. "
        "See their messages above, and in logs/ in output_dir; a job that is submitted anew counts from the start"
    )


def put_back(job: Allocation, output_dir: Path, code: int, received: str | None) -> None:
    """Put the job back into the queue if another attempt of it can go further; say which.

    Args:
        code: exit code of this attempt.
        received: name of the signal that asked this process to stop; None without one.
    """
    attempts = _attempts(output_dir)
    ours = bool(attempts) and (attempts[-1].job, attempts[-1].restarts) == (job.job, job.restarts)
    if not ours or not _can_go_on(output_dir, code, received):  # not ours: another job has output_dir
        return
    if _newest_step(output_dir) == attempts[-1].step and _count(attempts) >= _MOST:
        print(_loop(attempts[-1].step, _count(attempts)), file=sys.stderr, flush=True)
        return
    state = _state(job)
    if state != "RUNNING":
        print(f"job {job.job} is {state}: not put back into the queue", flush=True)
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):  # SLURM ends this process next: let it end by itself
        signal.signal(number, signal.SIG_IGN)
    done = subprocess.run(["scontrol", "requeue", job.job], capture_output=True, text=True, check=False)
    told = "put back into the queue" if done.returncode == 0 else f"cannot be put back: {done.stderr.strip()}"
    print(f"job {job.job}: {told}", flush=True)


def _can_go_on(output_dir: Path, code: int, received: str | None) -> bool:
    """Whether the scheduler, and not a person, stopped it; or it failed of what may pass."""
    if code != StopRequested.exit_code:
        return code in _MAY_PASS
    stop = output_dir / STOP_FILE
    return (received or (stop.read_text().strip() if stop.exists() else _SCHEDULERS_SIGNAL)) == _SCHEDULERS_SIGNAL


def _state(job: Allocation) -> str:
    said = subprocess.run(
        ["scontrol", "show", "job", job.job, "-o"], capture_output=True, text=True, check=False
    ).stdout
    return next((word.partition("=")[2] for word in said.split() if word.startswith("JobState=")), "unknown")


def let_earlier_attempt_end(output_dir: Path, job: Allocation) -> None:
    """Wait for what an earlier attempt of this job still does in output_dir, on a node that SLURM has given up.

    It is asked to stop; what cannot hear it is gone when its lock expires.
    """
    deadline = time.monotonic() + 2 * EXPIRED_S
    asked = False
    while time.monotonic() < deadline:
        holder = living_holder(output_dir)
        if holder is None or holder.get("slurm_job") != job.job or holder.get("slurm_restarts", 0) >= job.restarts:
            return
        if not asked:
            asked = True
            print(
                f"attempt {holder.get('slurm_restarts', 0)} of this job may still run on {holder.get('host')}: waiting "
                f"for its end, or for {EXPIRED_S:.0f} s without a sign of life",
                flush=True,
            )
            write_atomically(output_dir / STOP_FILE, f"restart {job.restarts} of the job")
        time.sleep(1.0)
