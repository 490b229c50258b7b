"""What one rank sets up around the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from deepspeed import DeepSpeedEngine, comm
from transformers import PreTrainedTokenizerBase

from dsdpo.checkpoint.resume import NO_RESUME_POINT, find_resume_point, restore
from dsdpo.checkpoint.run_metadata import identity, run_metadata
from dsdpo.checkpoint.saver import Saver
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.loader import PairLoader, PairSource
from dsdpo.data.order import pairs_of_steps, steps_per_epoch
from dsdpo.data.templates import load_tokenizer
from dsdpo.engine.engine import Hardware, build_engine, describe
from dsdpo.export.huggingface import export_engine
from dsdpo.objectives.preference import PreferenceObjective
from dsdpo.plan.memory import row_tokens
from dsdpo.reference.source import Reference, reference_source
from dsdpo.runtime.collectives import any_rank, run_on_main
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.faults import fault_point
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.runtime.watchdog import Watch
from dsdpo.train.evaluate import evaluate
from dsdpo.train.metrics import Reporter
from dsdpo.train.schedule import Schedule


@dataclass
class Session:
    """Everything that the training loop uses, built once per rank."""

    config: RunConfig
    mesh: Mesh
    hardware: Hardware
    engine: DeepSpeedEngine
    tokenizer: PreTrainedTokenizerBase
    objective: PreferenceObjective
    loader: PairLoader
    reference: Reference
    held_out: tuple[PairLoader, Reference] | None
    schedule: Schedule
    steps_per_epoch: int
    reporter: Reporter
    stop_flag: StopFlag
    first_step: int
    saver: Saver
    watch: Watch

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and step % every == 0 and step < self.schedule.total_steps

    def evaluation_is_due(self, step: int) -> bool:
        """Every eval_steps; the one after the last step is made by the caller of the loop."""
        return self.held_out is not None and self._is_due(step, self.config.eval_steps)

    def save_is_due(self, step: int) -> bool:
        """Every save_steps, and after the last step."""
        at_the_end = self.config.save_steps is not None and step == self.schedule.total_steps
        return at_the_end or self._is_due(step, self.config.save_steps)

    def evaluation_is_missing(self, step: int) -> bool:
        """Whether an earlier process has saved after `step`, but not evaluated. A collective call."""
        due = step > 0 and self.evaluation_is_due(step)
        return due and not run_on_main(self.mesh.is_main, lambda: self.reporter.has_evaluation(step))

    def evaluate(self, step: int) -> bool:
        """Report means over the held-out pairs, if there are any. False: it was left, as the run is to stop."""
        if self.held_out is None:
            return True
        loader, reference = self.held_out
        batch_size, device = self.config.train_batch_size, self.hardware.device

        def goes_on() -> bool:
            self.watch.goes_on()
            fault_point("evaluation:batch")
            return not any_rank(bool(self.stop_flag), device)

        with self.watch.slow("an evaluation"):
            means = evaluate(self.engine, loader, reference, self.objective, batch_size, device, goes_on)
        if means is None:
            self.reporter.say(f"left the evaluation after step {step} to stop; the same command makes up for it")
            return False
        self.reporter.evaluation(step, means)
        return True

    def save(self, step: int) -> None:
        """Make a checkpoint after `step` steps."""
        with self.watch.slow("a checkpoint"):
            self.saver.save(step)
            if not self.config.async_save:
                self.check_room(step)

    def check_room(self, step: int) -> None:
        """End the run here if there will be no room for the next checkpoint. A collective call; raises IOFailure."""
        if self.config.save_steps is not None and step < self.schedule.total_steps:
            self.saver.check_room()

    def save_final(self) -> Path:
        """Export the trained weights."""
        folder = RunDir(Path(self.config.output_dir)).final
        export_engine(self.engine, self.tokenizer, folder, self.mesh.is_main)
        comm.barrier()
        self.reporter.say(f"weights: {folder}")
        return folder


def build_session(
    config: RunConfig,
    zero: ZeroConfig,
    mesh: Mesh,
    hardware: Hardware,
    train_set: PairSource,
    eval_set: PairSource | None,
    stop_flag: StopFlag,
    watch: Watch | None = None,
    trains: bool = True,
) -> Session:
    """Load the model, fill what the reference store lacks for the two sets, and put back what a checkpoint holds.

    Args:
        watch: over this rank. None: nobody watches.
        trains: False to fill the store alone, which leaves the checkpoints and metrics of output_dir as they are.

    Raises:
        ConfigError: the model cannot be trained this way.
        CheckpointError: output_dir holds checkpoints, and none can be continued by this run.
        NumericError: the reference gives log-probs that are not finite.
        IOFailure: there is no room for a checkpoint.
    """
    per_epoch = steps_per_epoch(len(train_set), config.train_batch_size)
    schedule = Schedule.of(config, per_epoch)
    # it fetches the weights of a hub id, which the identity hashes
    engine = build_engine(config, zero, mesh, hardware)
    start = find_resume_point(config, mesh, identity(config, mesh, hardware, train_set)) if trains else NO_RESUME_POINT
    reporter = Reporter(config, schedule.total_steps, mesh.is_main, start.step if trains else None)
    for line in start.remarks:
        reporter.say(line)
    reporter.say(describe(engine, config, zero, mesh, hardware))
    reference_of = reference_source(config, zero, mesh, hardware, engine, reporter.say, stop_flag)
    # a live reference takes its memory first; rows as before make the same steps to the bit
    row_length = start.row_tokens(config, mesh, row_tokens(config, engine, hardware))

    def with_reference(pairs: PairSource, ids: np.ndarray) -> tuple[PairLoader, Reference]:
        loader = PairLoader(pairs, mesh, row_length, config.share_prefix)
        return loader, reference_of(loader, ids)

    used = pairs_of_steps(schedule.total_steps, len(train_set), config.train_batch_size, config.seed)
    loader, reference = with_reference(train_set, used)
    held_out = with_reference(eval_set, np.arange(len(eval_set))) if eval_set is not None else None
    facts = {**start.identity, **run_metadata(config, mesh, engine, train_set, row_length)}
    watch = watch or Watch(RunDir(Path(config.output_dir)), mesh, config.hang_timeout, None)
    saver = Saver(config, engine, mesh, facts, reporter.say, watch.token)
    if start.checkpoint is not None:  # after the reference, which the untrained policy may have had to compute
        restore(engine, start.checkpoint, config, mesh)
        reporter.say(f"resumed after step {start.step} from {start.checkpoint.path}")
    if trains and config.save_steps is not None and start.step < schedule.total_steps:
        saver.check_room()
    reporter.say(
        f"{len(train_set)} pairs, {schedule.total_steps} steps of {config.train_batch_size} pairs, rows of at most "
        f"{row_length} tokens"
    )
    return Session(
        config=config,
        mesh=mesh,
        hardware=hardware,
        engine=engine,
        tokenizer=load_tokenizer(config.model_name_or_path),
        objective=PreferenceObjective(config),
        loader=loader,
        reference=reference,
        held_out=held_out,
        schedule=schedule,
        steps_per_epoch=per_epoch,
        reporter=reporter,
        stop_flag=stop_flag,
        first_step=start.step,
        saver=saver,
        watch=watch,
    )
