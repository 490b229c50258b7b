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
import yaml
from deepspeed import DeepSpeedEngine, comm
from transformers.utils.logging import disable_progress_bar

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.loader import PairLoader
from dsdpo.data.prepare import open_prepared
from dsdpo.engine.engine import Hardware, build_engine, start_process_group
from dsdpo.engine.nvme import swap_removed
from dsdpo.errors import DataError, DsdpoError, IOFailure, StopRequested
from dsdpo.export.huggingface import set_aside
from dsdpo.objectives.preference import PreferenceObjective
from dsdpo.reference.source import NoReference, Reference, open_store, reference_for
from dsdpo.runtime.collectives import all_gather_object, any_rank
from dsdpo.runtime.env import Mesh, launched
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.lock import holder
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
from dsdpo.train.setup import Session, build_session

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def run(
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
    disable_progress_bar()  # transformers' bars for loading and saving, one per rank
    run_dir = RunDir(Path(config.output_dir))
    stop_flag = StopFlag(run_dir, mesh.is_main, _deadline(config, run_dir) if mesh.is_main else None)
    stop_flag.install()
    if mesh.is_main:
        reserve_exit(run_dir)
    with _exit_recorded(run_dir, mesh), swap_removed(zero, mesh):
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
                session = build_session(config, zero, mesh, hardware, train_set, eval_set, stop_flag, watch, trains)
                if trains:
                    _train(session, run_dir)
                with watch.slow("the end of the reports"):
                    session.reporter.close()
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


def _train(session: Session, run_dir: RunDir) -> None:
    """The run itself, the export of its weights and its last evaluation."""
    config, is_main = session.config, session.mesh.is_main
    if is_main:
        write_atomically(run_dir.run_config, yaml.safe_dump(config.model_dump(), sort_keys=False))
        if session.first_step < session.schedule.total_steps:
            set_aside(run_dir)  # of a run that was to end before, and was given more steps
    comm.barrier()
    done, total = train(session), session.schedule.total_steps
    with session.watch.slow("the last checkpoint"):
        if done < total and done not in (session.saver.last_step, session.first_step):
            session.saver.save(done)
        session.saver.finish()
    if done < total:
        raise StopRequested(
            f"stopped on request after step {done} of {total}, with a checkpoint; the same command goes on from there"
        )
    with session.watch.slow("the export of the weights"):
        session.save_final()
    if not session.evaluate(total):
        with session.watch.slow("the last checkpoint"):
            if total not in (session.saver.last_step, session.first_step):
                session.saver.save(total)
            session.saver.finish()
        raise StopRequested(
            "stopped on request in the last evaluation; the weights are exported, and the same command evaluates them"
        )
    if is_main:
        write_atomically(run_dir.completed, "")


def _evaluate(config: RunConfig, zero: ZeroConfig, mesh: Mesh, hardware: Hardware, model: str, stop: StopFlag) -> None:
    """Loss, accuracy and margin of trained weights on the held-out pairs, printed as one JSON line."""
    pairs = open_prepared(config, "eval")
    if pairs is None:
        raise DataError("there is nothing to evaluate on: name an eval_dataset, or a val_size above 0")

    def say(line: str) -> None:
        if mesh.is_main:
            print(line, flush=True)

    ids, device = np.arange(len(pairs)), hardware.device
    # without gradients a row takes little: no need to look how much memory there is
    loader = PairLoader(pairs, mesh, config.row_tokens or 4 * config.max_length, config.share_prefix)
    reference: Reference = NoReference()
    if config.reference_kind != "none":
        store = open_store(config, mesh, hardware)

        def untrained() -> DeepSpeedEngine:
            return build_engine(config, zero, mesh, hardware)

        reference = reference_for(loader, ids, store, untrained, device, say, stop)
    engine = build_engine(config, zero, mesh, hardware, weights=model)

    def goes_on() -> bool:
        return not any_rank(bool(stop), device)

    means = evaluate(engine, loader, reference, PreferenceObjective(config), config.train_batch_size, device, goes_on)
    if means is None:
        raise StopRequested("stopped on request; nothing is kept of an evaluation")
    say(json.dumps({"model": model, "pairs": len(pairs), **{key: round(value, 6) for key, value in means.items()}}))
