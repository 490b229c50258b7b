"""Who am I among the ranks: the only reader of RANK, SLURM_PROCID and their kin.

No torch at import: the command line asks `launched()` before anything heavy is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process's place: global rank, number of ranks, rank on its node."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0


def _from_env(rank_key: str, world_key: str, local_key: str) -> Ranks | None:
    if rank_key not in os.environ or world_key not in os.environ:
        return None
    return Ranks(int(os.environ[rank_key]), int(os.environ[world_key]), int(os.environ.get(local_key, "0")))


def launched() -> Ranks | None:
    """The place that a launcher gave this process, or None when it was started plainly.

    RANK and WORLD_SIZE come from the `deepspeed` launcher, torchrun and accelerate; SLURM_PROCID counts only
    inside an `srun` step (a batch script has it too, but is no rank).
    """
    found = _from_env("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if found is None and "SLURM_STEP_ID" in os.environ and "SLURM_STEP_TASKS_PER_NODE" in os.environ:
        found = _from_env("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return found


def slurm_job() -> str | None:
    """Id of the SLURM job that this process belongs to, None outside of one."""
    return os.environ.get("SLURM_JOB_ID")
