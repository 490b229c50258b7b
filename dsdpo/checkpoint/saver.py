"""Checkpoints of a run: all ranks write their pieces, the main rank makes the checkpoint count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine

from dsdpo.checkpoint.commit import RUN_FILE, FileRecord, commit, hashed_file, retain, stage, step_folder
from dsdpo.checkpoint.fragments import Index, index_of, join_indices, rank_file, tensors_of, write_tensors
from dsdpo.checkpoint.random_state import random_state
from dsdpo.config.schema import RunConfig
from dsdpo.engine.zero_state import adam_step, iter_state_shards, set_adam_step, shards_to_save, trained_weights
from dsdpo.errors import DsdpoError, IOFailure
from dsdpo.plan.memory import checkpoint_bytes
from dsdpo.runtime.collectives import all_gather_object, raise_on_any_rank, run_on_main
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.faults import fault_point
from dsdpo.runtime.lock import is_held_by
from dsdpo.runtime.rundir import RunDir


@dataclass
class _InFlight:
    """A checkpoint that is being written."""

    step: int
    staged: Path
    folder: Path
    index: Index
    written: Future[dict[str, FileRecord]]


class SaveStatus(NamedTuple):
    """Whether a rank has written its part of the save in flight, well or not, and whether it could not."""

    written: bool = False
    failed: bool = False


class Saver:
    """Makes checkpoints. Every rank has one, and calls its methods at the same points.

    Args:
        config: the run.
        engine: of the policy.
        mesh: this rank's place.
        facts: what run.json says beside the step: the same in all checkpoints of this process.
        say: where progress is told.
        token: of the lock on output_dir, looked at before a checkpoint counts; None without a lock.
        changing: what run.json says beside the step that changes from step to step.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: DeepSpeedEngine,
        mesh: Mesh,
        facts: dict[str, Any],
        say: Callable[[str], None],
        token: str | None = None,
        changing: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._config = config
        self._engine = engine
        self._mesh = mesh
        self._facts = facts
        self._say = say
        self._token = token
        self._changing = changing
        self._run_dir = RunDir(Path(config.output_dir))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._in_flight: _InFlight | None = None
        self._host: torch.Tensor | None = None
        self.last_step: int | None = None

    # --- what the training loop sees ---

    @property
    def facts(self) -> dict[str, Any]:
        """What each checkpoint says of its run."""
        return self._facts

    @property
    def status(self) -> SaveStatus:
        """Of the save in flight on this rank."""
        written = self._in_flight is not None and self._in_flight.written.done()
        return SaveStatus(written, written and self._in_flight.written.exception() is not None)  # type: ignore[union-attr]

    def poll(self, step: int, written: int, failed: int) -> bool:
        """Commit the save in flight once every rank has written its part, or fail on all ranks where one could not.

        Args:
            step: whose end the counts tell of.
            written, failed: ranks whose `status` said so then.

        Returns:
            Whether it was committed now.

        Raises:
            IOFailure: a part could not be written.
        """
        flying = self._in_flight
        if flying is None or step <= flying.step or not (failed or written == self._mesh.world_size):
            return False
        self.finish()
        return True

    def save(self, step: int) -> None:
        """Save the state after `step` steps; with async_save, return when it is copied to the host's memory.

        Raises:
            IOFailure: the file system refused; earlier checkpoints are as they were. The same on all ranks.
        """
        self.finish()
        self.last_step = step
        folder = step_folder(self._run_dir, step)
        staged: Path = run_on_main(self._mesh.is_main, lambda: stage(folder))
        fault_point("save:staged")
        if adam_step(self._engine) == 0:  # no step so far had a token in the loss
            set_adam_step(self._engine, 0)
        pieces = shards_to_save(self._engine, self._mesh.rank, self._mesh.world_size)
        tensors = tensors_of(pieces)
        if self._config.async_save:
            tensors = self._copied(tensors)
        tensors |= random_state()
        run = None
        if self._mesh.is_main:
            run = {"step": step, "adam_step": adam_step(self._engine), **self._changing(), **self._facts}
        job = self._pool.submit(self._write, staged, tensors, run)
        self._in_flight = _InFlight(step, staged, folder, index_of(pieces, self._mesh.rank), job)
        if not self._config.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight and commit it. A collective call.

        Raises:
            IOFailure: it failed, on whichever rank.
        """
        flying, self._in_flight = self._in_flight, None
        if flying is None:
            return
        try:
            records = all_gather_object(raise_on_any_rank(flying.written.result))
            index = join_indices(all_gather_object(flying.index))
            run_on_main(self._mesh.is_main, lambda: self._commit(flying, records, index))
        except DsdpoError:
            if self._mesh.is_main:
                shutil.rmtree(flying.staged, ignore_errors=True)
            raise
        self._say(f"checkpoint: {flying.folder}")

    def close(self) -> None:
        """Wait for what runs in the background; a save in flight is given up."""
        self._pool.shutdown(wait=True)

    def check_room(self) -> None:
        """Tell a full disk before the steps whose checkpoint would fill it. A collective call.

        Raises:
            IOFailure: there is no room for one more checkpoint.
        """
        run_on_main(self._mesh.is_main, self._check_room)

    # --- how ---

    def _check_room(self) -> None:
        needed = checkpoint_bytes(trained_weights(self._engine))
        free = shutil.disk_usage(self._run_dir.path).free
        if free < needed:
            raise IOFailure(
                f"the next checkpoint takes {needed / 2**30:.2f} GiB, but {self._run_dir} has {free / 2**30:.2f} "
                "GiB free; free space, set save_total_limit, or choose another output_dir. What has been saved is "
                "whole: the same command goes on from there"
            )

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in one block of host memory that is kept between saves, page-locked where there is a GPU.

        One block, since the allocator of page-locked memory rounds each up to a power of two.
        """
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._host is None:
            numel = sum(tensor.numel() for tensor in tensors.values())
            self._host = torch.empty(numel, dtype=torch.float32, pin_memory=on_gpu)
        copies, start = {}, 0
        for key, tensor in tensors.items():
            copies[key] = self._host[start : start + tensor.numel()].view(tensor.shape)
            copies[key].copy_(tensor, non_blocking=True)
            start += tensor.numel()
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _write(
        self, staged: Path, tensors: dict[str, torch.Tensor], run: dict[str, Any] | None
    ) -> dict[str, FileRecord]:
        name = rank_file(self._mesh.rank, self._mesh.world_size)
        with closing(iter_state_shards(self._engine)) as portions:  # begun only where the state is on NVMe
            records = {name: write_tensors(staged / name, tensors, map(tensors_of, portions))}
        fault_point("save:rank-written")
        if run is not None:
            with hashed_file(staged / RUN_FILE) as file:
                file.write(json.dumps(run, indent=1).encode())
            records[RUN_FILE] = file.record
        return records

    def _commit(self, flying: _InFlight, records: list[dict[str, FileRecord]], index: Index) -> None:
        if self._token is not None and not is_held_by(self._run_dir, self._token):
            raise IOFailure(f"another job has taken over {self._run_dir}; this one ends without a checkpoint")
        files = {name: record for part in records for name, record in part.items()}
        facts = {"step": flying.step, "world_size": self._mesh.world_size, "parameters": index}
        commit(flying.staged, flying.folder, files, facts)
        retain(self._run_dir, self._config.save_total_limit, self._config.save_every_forever)
