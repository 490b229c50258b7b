"""`dsdpo train` inside a SLURM job: one task a node through srun, and back into the queue when the run can go on.

The batch script replaces itself with `dsdpo train --requeue`, so that the scheduler's warning reaches this process.
"""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.errors import ConfigError, DsdpoError, HangError, IOFailure, Problem, StopRequested
from dsdpo.launch.preflight import ClusterRequest
from dsdpo.runtime.env import Allocation
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.lock import EXPIRED_S, living_holder
from dsdpo.runtime.rundir import RunDir

_MOST = 3  # attempts that fail where they began
_MOST_STOPPED = 20  # that the scheduler stops there: filling a reference store may take several
_CONTROLLER_AWAY_S, _CONTROLLER_PAUSE_S = 120.0, 5.0
# What SLURM's commands say of a controller that is busy or fails over, not of the job.
_CONTROLLER_AWAY = ("timed out", "unable to contact", "unexpected message", "connection re", "zero bytes", "standby")
# Ends after which another attempt can do better: a rank died, a file system was away, an error outside of dsdpo.
_MAY_PASS = (1, HangError.exit_code, IOFailure.exit_code)
_SCHEDULERS_SIGNAL = "SIGUSR1"
_FROM_SLURM = (_SCHEDULERS_SIGNAL, "SIGTERM")  # what comes before SLURM kills; it puts no job back that scancel ended


# --- the ranks ---


def ranks_per_node(wanted: int | None, gpus: int) -> int:
    """One for each GPU, or for each node without any.

    Args:
        wanted: --num_accelerators.
        gpus: on each node, of the job.

    Raises:
        ConfigError: more than there are GPUs.
    """
    if wanted and gpus and wanted > gpus:
        text = f"--num_accelerators is {wanted}, but the job has {gpus} GPUs on each node"
        raise ConfigError(Problem("too-few-devices", "num_accelerators", text))
    return wanted or gpus or 1


def srun_command(
    argv: list[str],
    job: Allocation,
    ranks: int,
    run_dir: RunDir,
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
    command += ["--export=ALL"]  # of this process, whatever the job itself was submitted with
    command += ["--cpu-bind=none"]  # or a site's default binds all of a node's ranks to the task's one core
    command += ["--kill-on-bad-exit=1", "--wait=60"]  # a node that ended takes the others along
    command += shlex.split(environment.get("DSDPO_SRUN_ARGS", ""))
    command += [environment.get("DSDPO_PYTHON", sys.executable), "-m", "dsdpo.launch.slurm_node"]
    command += ["--nodes", str(job.nodes), "--ranks", str(ranks)]
    command += ["--master_addr", cluster.master_addr or job.address]
    command += ["--master_port", str(cluster.master_port or job.port)]
    return [*command, "--output_dir", str(run_dir.path.absolute()), "--", *argv]


# --- the queue ---


@dataclass(frozen=True)
class Attempt:
    """A start of a job's script.

    Attributes:
        restarts: how often the job was put back into the queue before.
        step: of the newest checkpoint at the start.
        code: how it ended; None as long as it has not, and where its node died.
    """

    job: str
    restarts: int
    step: int
    code: int | None = None


class Attempts:
    """The attempts of one job, in output_dir/attempts.jsonl: whether there should be another one.

    Args:
        job: of this attempt.
        run_dir: of the run.
    """

    def __init__(self, job: Allocation, run_dir: RunDir) -> None:
        self._job = job
        self._run_dir = run_dir
        self._file = run_dir.attempts
        self._now: Attempt | None = None

    def begin(self) -> None:
        """Note that this attempt begins.

        Raises:
            HangError: too many have failed here; SLURM itself puts a job back after the failure of a node.
            IOFailure: it cannot be noted, or earlier ones cannot be read.
        """
        step = _newest_step(self._run_dir)
        self._count_killed()
        earlier = self._here(step)
        if _are_too_many(earlier):
            raise HangError(_given_up(self._run_dir, step, len(earlier)))
        now = Attempt(self._job.job, self._job.restarts, step)
        self._write([*self._all(), now])
        self._now = now  # what cannot be counted, as on a full disk, does not come back: it would for ever

    def _count_killed(self) -> None:
        """Count an attempt that was killed after the scheduler had asked it to stop as stopped: STOP is still there."""
        attempts, stop = self._all(), self._run_dir.stop
        killed = bool(attempts) and attempts[-1].job == self._job.job and attempts[-1].code is None
        if killed and stop.exists() and stop.read_text().strip() in _FROM_SLURM:
            self._write([*attempts[:-1], replace(attempts[-1], code=StopRequested.exit_code)])

    def end(self, code: int, received: str | None) -> None:
        """Put the job back into the queue if another attempt of it can go further, and say so.

        Args:
            code: exit code of this attempt.
            received: name of the first signal that asked this process to stop; None without one.
        """
        if self._now is None:
            return
        try:
            ended = replace(self._now, code=code)
            self._write([ended if attempt == self._now else attempt for attempt in self._all()])
            goes_on, given_up = _can_go_on(self._run_dir, code, received), self._given_up()
        except (OSError, DsdpoError):  # the folder is away: whoever comes back will see
            goes_on = code in _MAY_PASS or (code == StopRequested.exit_code and received == _SCHEDULERS_SIGNAL)
            given_up = ""
        if goes_on and given_up:
            print(given_up, file=sys.stderr, flush=True)
        elif goes_on:
            print(f"job {self._job.name}: {_put_back(self._job)}", flush=True)

    def _given_up(self) -> str:
        """Why there is no other attempt after this one; empty: there is."""
        assert self._now is not None
        if _newest_step(self._run_dir) != self._now.step:
            return ""
        here = self._here(self._now.step)
        return _given_up(self._run_dir, self._now.step, len(here)) if _are_too_many(here) else ""

    def _here(self, step: int) -> list[Attempt]:
        """The job's attempts in a row that began at `step`, the last ones."""
        ours = [attempt for attempt in self._all() if attempt.job == self._job.job]
        return list(itertools.takewhile(lambda attempt: attempt.step == step, reversed(ours)))

    def _all(self) -> list[Attempt]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        try:
            return [Attempt(**json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            raise IOFailure(
                f"{self._file} does not hold an attempt of a job in each line; remove it: attempts then count anew"
            ) from None

    def _write(self, attempts: list[Attempt]) -> None:
        write_atomically(self._file, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


def _are_too_many(attempts: list[Attempt]) -> bool:
    """Whether so many in a row without a new checkpoint are enough."""
    stopped = sum(attempt.code == StopRequested.exit_code for attempt in attempts)
    return len(attempts) - stopped >= _MOST or stopped >= _MOST_STOPPED


def _newest_step(run_dir: RunDir) -> int:
    return max((found.step for found in checkpoints(run_dir) if not found.problem), default=0)


def _given_up(run_dir: RunDir, step: int, count: int) -> str:
    where = f"after step {step}" if step else "at the beginning"
    return (
        f"{count} attempts of this job began {where} and ended without a new checkpoint: not put back into the queue. "
        f"See their messages above, and in {run_dir.logs}; a job that is submitted anew counts from the start"
    )


def _can_go_on(run_dir: RunDir, code: int, received: str | None) -> bool:
    """Whether the scheduler, and not a person, stopped it; or it failed of what may pass."""
    if code != StopRequested.exit_code:
        return code in _MAY_PASS
    stop = run_dir.stop
    return (stop.read_text().strip() if stop.exists() else received or _SCHEDULERS_SIGNAL) == _SCHEDULERS_SIGNAL


def _put_back(job: Allocation) -> str:
    """Put the job back into the queue; asks again where SLURM's controller is away. Returns what became of that."""
    deadline, asked = time.monotonic() + _CONTROLLER_AWAY_S, False
    while True:
        done = _scontrol("show", "job", job.name, "--oneliner")
        if done.returncode == 0:
            record = dict(word.partition("=")[::2] for word in done.stdout.split())
            if record.get("JobState") != "RUNNING" or record.get("Restarts") != str(job.restarts):
                if asked:  # it was heard after all
                    break
                return f"not put back into the queue, as it is {record.get('JobState', 'unknown')} by now"
            for number in (signal.SIGTERM, signal.SIGUSR1):  # SLURM ends this process next: let it end by itself
                signal.signal(number, signal.SIG_IGN)
            done, asked = _scontrol("requeue", "Incomplete", job.name), True
            if done.returncode == 0:
                break
        is_away = any(words in done.stderr.lower() for words in _CONTROLLER_AWAY)
        if not is_away or time.monotonic() > deadline:
            return f"cannot be put back into the queue: {done.stderr.strip()}"
        time.sleep(_CONTROLLER_PAUSE_S)
    return "put back into the queue"


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)


def let_earlier_attempt_end(run_dir: RunDir, job: Allocation) -> None:
    """Wait for what an earlier attempt of this job still does in output_dir, on a node that SLURM has given up.

    It is asked to stop; what cannot hear that is gone when its lock expires.
    """
    asked = False
    while True:
        holder = living_holder(run_dir)
        if holder is None or holder.get("slurm_job") != job.job or holder.get("slurm_restarts", 0) >= job.restarts:
            return
        if not asked:
            asked = True
            print(
                f"attempt {holder.get('slurm_restarts', 0) + 1} of this job may still run on {holder.get('host')}: "
                f"waiting for its end, or for {EXPIRED_S:.0f} s without a sign of life",
                flush=True,
            )
            write_atomically(run_dir.stop, f"attempt {job.restarts + 1} of the job")
        time.sleep(1.0)
