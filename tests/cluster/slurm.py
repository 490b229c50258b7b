"""A SLURM cluster of four nodes with two GPUs each, for tests, in one folder of one machine."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.machine import BOUND, Machine, find, until, what_is_missing

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

# Times are short where a test would wait for them. cred_expire: a job is not requeued before its credential ends.
# Ids start at random: jobs of two clusters on this machine may take a port from theirs.
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/records
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
FirstJobId={first_job}
MinJobAge=3600
InactiveLimit=0
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=30
GresTypes=gpu
NodeName=DEFAULT CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here, or an empty string."""
    return what_is_missing(PROGRAMS, trial="mknod /dev/shm/gpu c 1 3")


class Slurm:
    """The cluster runs from `with` to the end of its block.

    Partitions: `debug`, the default, whose jobs are requeued, 30 s after a signal, for those in `urgent`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**ours, "SLURM_CONF": f"{folder}/slurm.conf"}
        self.machines: dict[str, Machine] = {}
        self._daemons = ExitStack()

    def __enter__(self) -> Slurm:
        for part in ("log", "state", "spool"):
            (self.folder / part).mkdir()
        # GPUs must be devices for SLURM to number them; these are /dev/null.
        for gpu in ("gpu0", "gpu1"):
            os.mknod(self.folder / gpu, 0o600 | 0o020000, os.makedev(1, 3))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "slurm.conf").write_text(_conf(self.folder))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _start(self) -> None:
        # --force: pytest's folders are closed to other users, and munged insists on none where it listens.
        munge = ["--force", "--foreground", "--num-threads=2"]
        munge += [f"--{part}-file={self.folder}/munge.{part}" for part in ("key", "pid", "seed")]
        self._daemon("munged", *munge, f"--socket={self.folder}/munge.socket")
        until((self.folder / "munge.socket").exists, f"munged (see {self.folder}/log)")
        self._controller = self._daemon("slurmctld", "-D")
        until(self._answers, f"slurmctld (see {self.folder}/log)")
        for name in NODES:
            self._start_machine(name)
        until(self._idle, f"four idle nodes (see {self.folder}/log)")

    def _answers(self) -> bool:
        return subprocess.run([find("scontrol"), "ping"], env=self.environment, capture_output=True).returncode == 0

    def _idle(self) -> bool:
        return all(self.node(name)["State"] == "IDLE" for name in NODES)

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """It ends with this process, or in `stop`; the last one started first."""
        with (self.folder / f"log/{program}.out").open("wb") as log:
            daemon = subprocess.Popen(
                [*BOUND, find(program), *arguments],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.callback(daemon.wait, 60)
        self._daemons.callback(daemon.terminate)
        return daemon

    def stop(self) -> None:
        """Ends everything: jobs and nodes by a power cut, then the daemons."""
        for name in NODES:
            self.kill_node(name)
        self._daemons.close()

    def call(self, program: str, *arguments: str, cwd: Path | str | None = None, **variables: str) -> str:
        """Output of one of SLURM's commands, which must end well."""
        environment = {**self.environment, **variables}
        result = subprocess.run(
            [find(program), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{program} {arguments} ended with {result.returncode}: {result.stderr}"
        return result.stdout

    def sbatch(self, *arguments: str, cwd: Path | str | None = None, **variables: str) -> str:
        """Submits a job, whose environment is this one with `variables`; returns its id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, ExitCode, Restarts, NodeList, Reason, …"""
        return _fields(self.call("scontrol", "--oneliner", "show", "job", job).splitlines()[0])

    def node(self, name: str) -> dict[str, str]:
        """What `scontrol show node` knows: State, Reason, …"""
        return _fields(self.call("scontrol", "--oneliner", "show", "node", name))

    def records(self) -> list[dict[str, str]]:
        """A record for each end of a run of a job, requeued or not: JobId, JobState, NodeList, ExitCode, …"""
        path = self.folder / "records"
        return [_fields(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, job: str) -> str:
        """What the job has printed."""
        path = Path(self.job(job).get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else "(no output)"

    def wait(self, job: str, *states: str, timeout: float = 400) -> dict[str, str]:
        """The job when it gets into one of `states` (COMPLETED).

        Fails with the end of its log if it ends in another state, or after `timeout` seconds.
        """
        states = states or ("COMPLETED",)
        seen: dict[str, str] = {}

        def there() -> bool:
            seen.update(self.job(job))
            return seen["JobState"] in {*states, *ENDS}

        with suppress(pytest.fail.Exception):
            until(there, f"job {job}", timeout)
        if seen["JobState"] not in states:
            shown = {key: seen.get(key) for key in ("JobState", "Reason", "ExitCode", "Restarts", "NodeList")}
            pytest.fail(
                f"job {job} should be {' or '.join(states)} within {timeout:g} s: {shown}\n{self.log(job)[-4000:]}"
            )
        return seen

    def signal(self, job: str, name: str, batch: bool = True) -> None:
        """Sends a signal (USR1) to the batch script, or to the job's steps."""
        self.call("scancel", f"--signal={name}", *(["--batch"] if batch else []), job)

    def cancel(self, job: str) -> None:
        """`scancel`."""
        self.call("scancel", job)

    def limit(self, job: str, minutes: int) -> None:
        """Sets the time limit of a job, counted from its start."""
        self.call("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")

    def requeue(self, job: str) -> None:
        """`scontrol requeue`."""
        self.call("scontrol", "requeue", job)

    @contextmanager
    def controller_away(self) -> Iterator[None]:
        """Within, slurmctld answers nobody, as one that is busy or fails over."""
        self._controller.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._controller.send_signal(signal.SIGCONT)

    def kill_node(self, name: str) -> None:
        """The node dies: slurmd, slurmstepd and all processes of its jobs get SIGKILL. SLURM notices by itself."""
        if machine := self.machines.pop(name, None):
            machine.kill()

    def start_node(self, name: str) -> None:
        """Brings a node back, and waits until jobs can run on it."""
        if name not in self.machines:
            self._start_machine(name)

        def is_of_use() -> bool:
            state = self.node(name)["State"]
            if "*" not in state and ("DOWN" in state or "DRAIN" in state):  # it may come back by itself meanwhile
                resume = ["scontrol", "update", f"nodename={name}", "state=resume"]
                subprocess.run(resume, env=self.environment, capture_output=True, check=False)
            return state in ("IDLE", "MIXED", "ALLOCATED")

        until(is_of_use, f"{name} to be of use")

    def _start_machine(self, name: str) -> None:
        machine = self.machines[name] = Machine(name, self.folder / "hosts", self.environment)
        with (self.folder / f"log/slurmd.{name}.out").open("wb") as log:
            machine.start(find("slurmd"), "-D", "-N", name, stdout=log, stderr=log, start_new_session=True)

    def tidy(self) -> None:
        """Cancels all jobs and brings every node back, for the next test."""
        self.call("scancel", "--user=root")
        for name in NODES:
            self.start_node(name)
        until(lambda: not self.call("squeue", "--noheader"), "an empty queue")
        until(self._idle, "idle nodes")


def _fields(line: str) -> dict[str, str]:
    """`A=1 B=two words C=x=3` by name."""
    return dict(re.findall(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= +[A-Z][\w:/]*=|\s*$)", line))


def _conf(folder: Path) -> str:
    ports = _free_ports(1 + len(NODES))
    nodes = [f"NodeName={name} NodeAddr=127.0.0.1 Port={port}" for name, port in zip(NODES, ports[1:])]
    return _CONF.format(folder=folder, ports=ports, nodes="\n".join(nodes), first_job=random.randrange(1, 50_000))


def _free_ports(number: int) -> list[int]:
    """Free ports of the loopback interface, below those that Linux gives to outgoing connections."""
    sockets: list[socket.socket] = []
    with ExitStack() as stack:
        while len(sockets) < number:
            trial = stack.enter_context(socket.socket())
            try:
                trial.bind(("127.0.0.1", random.randrange(12_000, 32_000)))
            except OSError:
                continue
            sockets.append(trial)
        return [bound.getsockname()[1] for bound in sockets]
