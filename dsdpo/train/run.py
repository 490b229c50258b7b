"""A training run on one rank: what the loop uses, and all that follows a step and the last one.

A step is reported while the next one is under way, so that reading its numbers does not wait for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import yaml
from deepspeed import DeepSpeedEngine, comm
from transformers import PreTrainedTokenizerBase

from dsdpo.checkpoint.saver import Saver
from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch, BatchLoader
from dsdpo.data.order import Order
from dsdpo.data.packing import MicroBatch
from dsdpo.engine.engine import Hardware
from dsdpo.engine.loss_scale import StepScaling
from dsdpo.engine.row_tokens import FirstStep, Rows
from dsdpo.errors import IOFailure, NumericError, StopRequested
from dsdpo.export.card import write_card
from dsdpo.export.huggingface import export_engine, set_aside
from dsdpo.model.packed import ModelOutput, PackedInputs
from dsdpo.objectives.base import Objective
from dsdpo.reference.source import Reference
from dsdpo.runtime.collectives import any_rank, run_on_main
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.faults import fault_point
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.runtime.watchdog import Watch
from dsdpo.train.evaluate import evaluate
from dsdpo.train.host_share import HostShare, recorder
from dsdpo.train.metrics import MetricSums, Reporter
from dsdpo.train.report import not_finite, summary
from dsdpo.train.schedule import Schedule
from dsdpo.train.step import QueuedStep


@dataclass
class Run:
    """Everything that the training loop uses, set up once per rank.

    Attributes:
        held_out: loader and reference of the held-out set; None without one.
        first_step: steps that were taken by earlier processes.
        done: steps that have been taken.
        stopping: whether the run has been asked to end.
    """

    config: RunConfig
    mesh: Mesh
    hardware: Hardware
    engine: DeepSpeedEngine
    scaling: StepScaling
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    loader: BatchLoader
    rows: Rows
    reference: Reference
    held_out: tuple[BatchLoader, Reference] | None
    schedule: Schedule
    order: Order
    reporter: Reporter
    stop_flag: StopFlag
    first_step: int
    saver: Saver
    watchdog: Watch
    done: int = field(init=False)
    stopping: bool = field(init=False, default=False)
    _queued: QueuedStep | None = field(init=False, default=None)
    _first: FirstStep | None = field(init=False, default=None)
    _since: float = field(init=False, default=0.0)
    _began: float = field(init=False, default=0.0)
    _host: HostShare = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.first_step
        self._host = HostShare(recorder(self.hardware.device))

    @property
    def run_dir(self) -> RunDir:
        """The files of output_dir."""
        return RunDir(Path(self.config.output_dir))

    # --- what the loop calls ---

    def begin(self) -> None:
        """What comes before the first step, with an evaluation that an earlier process was to make. A collective call.

        Raises:
            IOFailure: output_dir cannot be written.
        """
        if self.mesh.is_main:
            options = self.config.model_dump() | {"hub": self.config.model_source.hub}
            write_atomically(self.run_dir.run_config, yaml.safe_dump(options, sort_keys=False))
            if self.first_step < self.schedule.total_steps:
                set_aside(self.run_dir)  # of a run that was to end before, and was given more steps
        comm.barrier()
        self.reporter.start()
        self._began = time.perf_counter()
        if self._evaluation_is_missing():
            self.stopping = not self.evaluate(self.done)
        self.engine.train()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(step, batch) of each optimizer step that is left; the step is 0-based."""
        steps = range(self.done, self.done if self.stopping else self.schedule.total_steps)
        alone = 1 if self.rows.is_estimate else 0  # the first step says how long rows are: no other is planned before
        if alone and steps:
            self._first = FirstStep(self.engine, self.hardware.device)
        size, seed, parts = self.config.train_batch_size, self.config.seed, (steps[:alone], steps[alone:])
        batches = chain.from_iterable(self.loader.training_batches(part, size, seed, self.order) for part in parts)
        self._since = time.perf_counter()
        return zip(steps, batches)

    def forward(self, micro_batch: MicroBatch) -> ModelOutput:
        """The policy's output for a micro-batch."""
        fault_point("forward", len(micro_batch.input_ids))
        self._host.mark()
        output = self.engine(PackedInputs.of(micro_batch, self.hardware.device))
        self._host.mark()
        return output

    def end_step(self, step: int, batch: Batch, sums: MetricSums, learning_rate: float) -> bool:
        """Report the step before, then save and evaluate where that is due after this one. A collective call.

        Args:
            step: 0-based.
            sums: reduced, not read.

        Returns:
            Whether the run has been asked to end.

        Raises:
            NumericError: a loss or gradient norm is not finite, on all ranks alike; names the step and its examples.
            IOFailure: a checkpoint cannot be written.
        """
        self._host.mark()
        host_share = self._host.take()
        self.flush()  # so the device never has more than one step to do
        self.done = step + 1
        if self._first is not None:
            self._correct_rows(self._first, batch)
        saves, evaluates = self._save_is_due(), self._evaluation_is_due()
        if saves or evaluates:
            sums.read()  # waits for this step as well: its time is its own
        seconds = time.perf_counter() - self._since
        self._queued = QueuedStep(self.done, batch, sums, learning_rate, self.scaling.record, seconds, host_share)
        if saves:
            self.flush()
            self._save()
        if evaluates and not self.stopping:
            self.flush()
            if not self.evaluate(self.done):
                self.stopping = True
        if saves or evaluates:
            self._host.pause()
        self._since = time.perf_counter()
        return self.stopping

    def _correct_rows(self, first: FirstStep, batch: Batch) -> None:
        """Take the length of rows that the first step's memory allows. A collective call."""
        self._first = None
        if remark := first.correct(self.rows, batch.micro_batches):
            self.reporter.say(remark)
            for loader in (self.loader, *(self.held_out or ())[:1]):
                loader.max_tokens_per_row = self.rows.tokens

    @property
    def has_checkpoint(self) -> bool:
        """Whether a process of this run has saved one."""
        return self.first_step > 0 or self.saver.last_step is not None

    def finish(self) -> None:
        """What follows the last step: its report, a checkpoint where the run stops early, else the export of the
        weights and an evaluation. A collective call.

        Raises:
            StopRequested: the run was asked to end before its last step or in its last evaluation.
            NumericError, IOFailure: see `end_step`.
        """
        self.flush()
        total = self.schedule.total_steps
        self._save_last(needed=self.done < total)
        if self.done < total:
            self._summarize()
            raise StopRequested(
                f"stopped on request after step {self.done} of {total}, with a checkpoint; the same command resumes "
                "from there"
            )
        with self.watchdog.slow("the export of the weights"):
            self.export()
        if not self.evaluate(total):
            self._save_last(needed=True)
            raise StopRequested(
                "stopped on request in the last evaluation; the weights are exported, and the same command evaluates "
                "them"
            )
        if self.mesh.is_main:
            write_card(self.run_dir.final, self.saver.facts, self.run_dir)
            write_atomically(self.run_dir.completed, "")
        self._summarize()

    def _summarize(self) -> None:
        """Say how the run went and what comes next."""
        if self.mesh.is_main:
            seconds = time.perf_counter() - self._began
            total, answers = self.schedule.total_steps, self.objective.head == "logprob"
            for line in summary(self.run_dir, self.first_step, self.done, total, seconds, answers):
                self.reporter.say(line)

    # --- reports ---

    def flush(self) -> None:
        """Report the queued step when the device is through with it; before a save, so that no state that is not finite
        is ever written. A collective call.

        Raises:
            NumericError: on all ranks alike.
            IOFailure: so is this; a checkpoint that is written beside the training has failed.
        """
        step, self._queued = self._queued, None
        if step is None:
            return
        totals = step.sums.read()
        if totals.bad_losses or not math.isfinite(totals.grad_norm):
            with self.watchdog.slow("the checkpoint before"), suppress(IOFailure):  # it is finite, and not to be lost
                self.saver.finish()
            raise NumericError(not_finite(step, totals, self.loader.source))
        self.stopping = self.stopping or totals.stop
        with self.watchdog.slow("a checkpoint"):
            if self.saver.poll(step.done, totals.written, totals.failed):
                self._check_room(step.done)
        updated = bool(self.objective.denominator(step.batch))
        for line in step.remarks(updated):
            self.reporter.say(line)
        epoch = step.done / self.order.steps_per_epoch(self.config.train_batch_size)
        self.reporter.step(step.record(totals, updated, epoch, self.hardware.device))

    # --- saves ---

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.done % every == 0 and self.done < self.schedule.total_steps

    def _save_is_due(self) -> bool:
        """Every save_steps, and after the last step."""
        at_the_end = self.config.save_steps is not None and self.done == self.schedule.total_steps
        return at_the_end or self._is_due(self.config.save_steps)

    def _save(self) -> None:
        with self.watchdog.slow("a checkpoint"):
            self.saver.save(self.done)
            if not self.config.async_save:
                self._check_room(self.done)

    def _save_last(self, needed: bool) -> None:
        """Commit the save in flight, and save the state after the last step where that is `needed` and not yet done."""
        with self.watchdog.slow("the last checkpoint"):
            if needed and self.done not in (self.saver.last_step, self.first_step):
                self.saver.save(self.done)
            self.saver.finish()

    def _check_room(self, step: int) -> None:
        """End the run here if there will be no room for the checkpoint after the next. Raises IOFailure."""
        if self.config.save_steps is not None and step < self.schedule.total_steps:
            self.saver.check_room()

    def export(self) -> Path:
        """Write the trained weights to output_dir/final. A collective call."""
        folder = self.run_dir.final
        export_engine(self.engine, self.tokenizer, folder, self.mesh.is_main)
        comm.barrier()
        self.reporter.say(f"weights: {folder}")
        return folder

    # --- evaluation ---

    def _evaluation_is_due(self) -> bool:
        """Every eval_steps; the one after the last step belongs to `finish`."""
        return self.held_out is not None and self._is_due(self.config.eval_steps)

    def _evaluation_is_missing(self) -> bool:
        """Whether an earlier process has saved after this step, but not evaluated. A collective call."""
        due = self.done > 0 and self._evaluation_is_due()
        return due and not run_on_main(self.mesh.is_main, lambda: self.reporter.has_evaluation(self.done))

    def evaluate(self, step: int) -> bool:
        """Report means over the held-out examples, if there are any. A collective call.

        Returns:
            False where it was interrupted, as the run is to stop.
        """
        if self.held_out is None:
            return True
        loader, reference = self.held_out
        batch_size, device = self.config.train_batch_size, self.hardware.device

        def goes_on() -> bool:
            self.watchdog.goes_on()
            fault_point("evaluation:batch")
            return not any_rank(bool(self.stop_flag), device)

        with self.watchdog.slow("an evaluation"):
            means = evaluate(self.engine, loader, reference, self.objective, batch_size, device, goes_on)
        if means is None:
            self.reporter.say(f"evaluation at step {step} interrupted by a stop request; it runs again on resume")
            return False
        self.reporter.evaluation(step, means)
        return True
