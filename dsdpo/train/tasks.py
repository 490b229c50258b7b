"""What a launched rank can be asked to do: train, fill the reference store, evaluate."""

from __future__ import annotations

import errno
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
from deepspeed import DeepSpeedEngine, comm

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.loader import BatchLoader
from dsdpo.data.prepare import open_prepared
from dsdpo.engine.engine import Hardware, build_engine, start_process_group
from dsdpo.engine.nvme import swap_removed
from dsdpo.engine.row_tokens import row_without_gradients
from dsdpo.errors import DataError, DsdpoError, IOFailure, StopRequested
from dsdpo.objectives.stages import objective_of
from dsdpo.reference.precompute import find_or_compute, open_store
from dsdpo.reference.source import NoReference, Reference, StoredReference
from dsdpo.runtime.collectives import all_gather_object, any_rank
from dsdpo.runtime.env import Mesh, launched
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.lock import holder
from dsdpo.runtime.progress import no_bars, show_library_progress
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import (
    ExitRecord,
    StopFlag,
    delay_exit,
    reserve_exit,
    wait_for_exit,
    write_exit,
)
from dsdpo.runtime.watchdog import Watch
from dsdpo.train.evaluate import evaluate
from dsdpo.train.loop import train
from dsdpo.train.out_of_memory import out_of_memory_told
from dsdpo.train.setup import set_up

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def run_task(
    config: RunConfig, zero: ZeroConfig, task: str = "train", model: str | None = None, token: str | None = None
) -> None:
    """Do one task as one rank; the data is prepared already.

    Args:
        config: the run, the same on every rank.
        zero: its DeepSpeed JSON.
        task: `train`, `reference` or `eval`.
        model: for `eval`, the folder of trained weights.
        token: of the lock on output_dir; the main rank's counts.

    Raises:
        DsdpoError: with the exit code; said in output_dir/EXIT too, for the supervisor.
    """
    mesh = launched() or Mesh(0, 1, 0)
    if config.disable_tqdm:
        no_bars()
    show_library_progress()
    run_dir = RunDir(Path(config.output_dir))
    stop_flag = StopFlag(run_dir, mesh.is_main, _deadline(config, run_dir) if mesh.is_main else None)
    stop_flag.install()
    if mesh.is_main:
        reserve_exit(run_dir)
    told = out_of_memory_told(config, zero, mesh)
    with _exit_recorded(run_dir, mesh), told as memory, swap_removed(zero, mesh):
        hardware = start_process_group(config, zero, mesh)
        watch = Watch(run_dir, mesh, config.hang_timeout, all_gather_object(token)[0])
        watch.start()
        with closing(watch):
            if task == "eval":
                assert model is not None, "eval needs the weights to evaluate"
                _evaluate(config, zero, mesh, hardware, model, stop_flag)
                comm.barrier()
            else:
                train_set = open_prepared(config, "train")
                assert train_set is not None, "a run has a training set"
                eval_set = open_prepared(config, "eval")
                trains = task == "train"
                run = set_up(config, zero, mesh, hardware, train_set, eval_set, stop_flag, watch, trains)
                memory.row_tokens, memory.recompute = (lambda: run.rows.tokens), (lambda: run.rows.recompute)
                if trains:
                    memory.shorter_row = lambda: None if run.has_checkpoint else run.rows.shorter()
                    train(run)
                with watch.slow("the end of the reports"):
                    run.reporter.close()
                    comm.barrier()


def _deadline(config: RunConfig, run_dir: RunDir) -> float | None:
    """When max_time is over, by time.time(): counted from when the lock was taken."""
    if config.max_seconds is None:
        return None
    since = (holder(run_dir) or {}).get("since")
    return (datetime.fromisoformat(since).timestamp() if since else time.time()) + config.max_seconds


@contextmanager
def _exit_recorded(run_dir: RunDir, mesh: Mesh) -> Iterator[None]:
    """Write output_dir/EXIT on the main rank, however the body ends."""
    try:
        yield
    except DsdpoError as error:
        if mesh.is_main:
            write_exit(run_dir, ExitRecord(error.exit_code, str(error), mesh.rank))
        elif isinstance(error, StopRequested):
            wait_for_exit(run_dir)  # a launcher ends the others as soon as one has ended
        raise
    except BaseException as error:
        if mesh.is_main:
            is_full = isinstance(error, OSError) and error.errno in _REFUSED
            code = IOFailure.exit_code if is_full else 1
            write_exit(run_dir, ExitRecord(code, traceback.format_exc(), mesh.rank))
        if isinstance(error, Exception) and mesh.world_size > 1:
            delay_exit()
        raise
    if mesh.is_main:
        write_exit(run_dir, ExitRecord(0, "done", mesh.rank))


def _evaluate(config: RunConfig, zero: ZeroConfig, mesh: Mesh, hardware: Hardware, model: str, stop: StopFlag) -> None:
    """Loss, accuracy and margin of trained weights on the held-out examples, printed as one JSON line."""
    source = open_prepared(config, "eval")
    if source is None:
        raise DataError("there is nothing to evaluate on: name an eval_dataset, or a val_size above 0")

    def say(line: str) -> None:
        if mesh.is_main:
            print(line, flush=True)

    ids, device = np.arange(len(source)), hardware.device
    least = int(source.lengths(ids).packed(config.share_prefix).max(initial=0))
    loader = BatchLoader(source, mesh, row_without_gradients(config, least), config.share_prefix)
    reference: Reference = NoReference()
    objective = objective_of(config)
    if objective.needs_reference:
        store = open_store(config, mesh, hardware)

        def untrained() -> DeepSpeedEngine:
            return build_engine(config, zero, mesh, hardware)

        reference = StoredReference(*find_or_compute(loader, ids, store, untrained, device, say, stop), device)
    engine = build_engine(config, zero, mesh, hardware, weights=model, head=objective.head)

    def goes_on() -> bool:
        return not any_rank(bool(stop), device)

    mine: dict[int, list[float]] = {}
    means = evaluate(engine, loader, reference, objective, config.train_batch_size, device, goes_on, mine)
    if means is None:
        raise StopRequested("stopped on request; nothing is kept of an evaluation")
    everyone = {key: values for part in all_gather_object(mine) for key, values in part.items()}
    if mesh.is_main:
        lines = (
            json.dumps({"example": i, "where": source.where(i), **dict(zip(objective.metrics, everyone[i]))}) + "\n"
            for i in sorted(everyone)
        )
        write_atomically(RunDir(Path(config.output_dir)).eval_examples, "".join(lines))
    say(json.dumps({"model": model, "examples": len(source), **{key: round(value, 6) for key, value in means.items()}}))
