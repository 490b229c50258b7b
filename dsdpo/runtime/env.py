"""Who am I among the ranks, and where do they meet: the only reader of RANK, SLURM_PROCID and their kin.

No torch at import: the command line asks `launched()` before anything heavy is loaded.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_INTERACTIVE_STEP = "4294967290"  # SLURM_STEP_ID of the shell that salloc opens on a node
# Of `gres:gpu:8`, `gres/gpu:a100:4`, `gres/gpu=4`, `gres:gpu:3g.40gb:2,gres:gpu:1g.5gb:1`: types have digits, too.
_GPUS_OF_TRES = r"(?<![^:/,])gpu(?::[^:=,()]+)?[:=](\d+)(?=[,(]|$)"
# Files in /dev of NVIDIA's drivers (the first three; dxg in WSL), and of AMD's, whose GPUs torch calls CUDA too.
_DRIVERS = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd")
_FIRST_PORT, _PORTS = 20000, 10000  # below the kernel's own range, which starts at 32768


@dataclass(frozen=True)
class Mesh:
    """This process's place among all ranks, and on the two axes that they form.

    The `sp_size` ranks of a sequence-parallel group are consecutive and share the same rows; data-parallel ranks have
    different ones. Sums, batch plans and the scale of the loss count data-parallel ranks; files, folders and process
    groups count all ranks.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        local_rank: rank on its node.
        sp_size: ranks that share a row; it divides world_size. 1: no sequence parallelism.
    """

    rank: int
    world_size: int
    local_rank: int
    sp_size: int = 1

    @property
    def dp_rank(self) -> int:
        """Which of the data-parallel ranks."""
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size // self.sp_size

    @property
    def sp_rank(self) -> int:
        """Which of the ranks that share a row."""
        return self.rank % self.sp_size

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0


@dataclass(frozen=True)
class Allocation:
    """The SLURM job that this process was started in, in its batch script or in the shell of salloc.

    Attributes:
        gpus_per_node: as many as the job asked for; None where SLURM does not say, as on a cluster that gives whole
            nodes, without a GRES for their GPUs.
        is_here: whether this process runs on one of the job's nodes.
        restarts: how often the job was put back into the queue.
        name: what SLURM's commands call it: a task of an array has the array's id too, which would mean all of them.
    """

    job: str
    nodes: int
    node_list: str
    gpus_per_node: int | None
    restarts: int
    name: str
    is_here: bool

    @property
    def address(self) -> str:
        """Of the first node, on which rank 0 runs; MASTER_ADDR names another one of that node."""
        return os.environ.get("MASTER_ADDR") or node_address(first_node(self.node_list))

    @property
    def port(self) -> int:
        """For the ranks to meet: MASTER_PORT, or the job's own, so that two jobs on a node do not clash."""
        return int(os.environ.get("MASTER_PORT") or job_port(self.job))


def _from_env(rank_key: str, world_key: str, local_key: str) -> Mesh | None:
    rank, world, local = (os.environ.get(key, "").strip() for key in (rank_key, world_key, local_key))
    return Mesh(int(rank), int(world), int(local or 0)) if rank and world else None  # a variable may be there, empty


def launched() -> Mesh | None:
    """The place that a launcher gave this process, or None when it was started plainly.

    RANK and WORLD_SIZE come from the `deepspeed` launcher, torchrun and accelerate; SLURM_PROCID counts only
    inside an `srun` step of several tasks: a batch script and the shell of `srun --pty` have it too, but are no ranks.
    """
    found = _from_env("RANK", "WORLD_SIZE", "LOCAL_RANK")
    is_step = os.environ.get("SLURM_STEP_ID", _INTERACTIVE_STEP) != _INTERACTIVE_STEP
    if found is None and is_step and "SLURM_STEP_TASKS_PER_NODE" in os.environ:
        step = _from_env("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if step is not None and step.world_size > 1:
            found = step
            if os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0:  # bound to a GPU of its own
                found = Mesh(step.rank, step.world_size, 0)
    return found


def has_gpu_driver() -> bool:
    """Whether this machine may have GPUs that are to be used, told without torch's import."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return False
    return any(found for pattern in _DRIVERS for found in Path("/dev").glob(pattern))


def set_rank_env(mesh: Mesh) -> tuple[str, int]:
    """Say this rank's place where libraries look for it; what the launcher has said stands.

    Returns:
        Address and port where the ranks meet. srun names none: then they are the first node and a port of the job.
    """
    here = {"RANK": mesh.rank, "WORLD_SIZE": mesh.world_size, "LOCAL_RANK": mesh.local_rank}
    for name, value in here.items():
        os.environ.setdefault(name, str(value))
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST")
        os.environ["MASTER_ADDR"] = node_address(first_node(nodes)) if nodes else "127.0.0.1"
    if "MASTER_PORT" not in os.environ:
        job, step = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_STEP_ID", "0")
        os.environ["MASTER_PORT"] = str(job_port(job, step))
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def elastic_agent() -> str | None:
    """Number of torchrun's attempt, where its agent and not rank 0 serves the meeting point; None elsewhere."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def allocation() -> Allocation | None:
    """The SLURM job whose nodes a process that was started plainly may use; None outside, and in a step of the job."""
    environment = os.environ
    if "SLURM_JOB_ID" not in environment or "SLURM_JOB_NODELIST" not in environment:
        return None
    if "SLURM_STEP_TASKS_PER_NODE" in environment and environment.get("SLURM_STEP_ID") != _INTERACTIVE_STEP:
        return None
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return Allocation(
        job=environment["SLURM_JOB_ID"],
        nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
        node_list=environment["SLURM_JOB_NODELIST"],
        gpus_per_node=_gpus_per_node(),
        restarts=slurm_restarts(),
        name=f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"],
        is_here="SLURMD_NODENAME" in environment,
    )


def _gpus_per_node() -> int | None:
    """What --gpus-per-node says (`8`, `a100:4`), which a step gets even where --exclusive gives the job more; or how
    many SLURM gave on this node."""
    if asked := os.environ.get("SLURM_GPUS_PER_NODE"):
        return sum(int(part.rpartition(":")[2]) for part in asked.split(","))
    if given := os.environ.get("SLURM_GPUS_ON_NODE"):
        return int(given)
    if ids := os.environ.get("SLURM_JOB_GPUS"):
        return len(ids.split(","))
    # The shell of salloc is told less than a batch script.
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if total := os.environ.get("SLURM_GPUS"):
        return int(total.rpartition(":")[2]) // nodes
    if not shutil.which("scontrol"):
        return None
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"], "--oneliner"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\bTresPerNode=(\S+)", said)
    counts = re.findall(_GPUS_OF_TRES, found[1]) if found else []
    return sum(map(int, counts)) if counts else None


def node_rank() -> int:
    """Number of this node in its srun step. Raises KeyError outside of one."""
    return int(os.environ["SLURM_NODEID"])


def slurm_job() -> str | None:
    """Id of the SLURM job that this process belongs to, None outside of one."""
    return os.environ.get("SLURM_JOB_ID")


def slurm_restarts() -> int:
    """How often SLURM has put this job back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def first_node(node_list: str) -> str:
    """The first name of SLURM's node list, such as gpu001 of `gpu[001-004,009],big1`."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", node_list).split(",")[0]


def node_address(node: str) -> str:
    """What other nodes reach `node` by: its name, or the address that SLURM has for it where the name means nothing."""
    with suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    with suppress(OSError):
        command = ["scontrol", "show", "node", node, "--oneliner"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if found := re.search(r"\bNodeAddr=(\S+)", said):
            return found[1]
    return node


def job_port(job: str, step: str = "0") -> int:
    """A port for a job's ranks to meet, from its numbers."""
    return _FIRST_PORT + (int(job) * 13 + int(step) % 13) % _PORTS
