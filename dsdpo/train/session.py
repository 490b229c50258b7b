"""What one rank sets up around the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from deepspeed import DeepSpeedEngine, comm
from transformers import PreTrainedTokenizerBase

from dsdpo.checkpoint.export import FINAL, INTERMEDIATE, export_engine
from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import PairLoader, PairSource
from dsdpo.data.order import pairs_of_steps, steps_per_epoch
from dsdpo.data.templates import load_tokenizer
from dsdpo.dist import Ranks
from dsdpo.objectives.preference import PreferenceObjective
from dsdpo.train.engine import Hardware, Schedule, build_engine, describe
from dsdpo.train.evaluate import evaluate
from dsdpo.train.memory import row_tokens
from dsdpo.train.metrics import Reporter
from dsdpo.train.objective import objective_of
from dsdpo.train.reference import Reference, reference_source
from dsdpo.train.stop import StopFlag


@dataclass
class Session:
    """Everything that the training loop uses, built once per rank."""

    config: RunConfig
    ranks: Ranks
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

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and step % every == 0 and step < self.schedule.total_steps

    def evaluation_is_due(self, step: int) -> bool:
        """Every eval_steps; the one after the last step is made by the caller of the loop."""
        return self.held_out is not None and self._is_due(step, self.config.eval_steps)

    def save_is_due(self, step: int) -> bool:
        """Every save_steps; the last step's weights are `final`."""
        return self._is_due(step, self.config.save_steps)

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Means over the held-out pairs, reported; None without held-out pairs."""
        if self.held_out is None:
            return None
        loader, reference = self.held_out
        means = evaluate(
            self.engine, loader, reference, self.objective, self.config.train_batch_size, self.hardware.device
        )
        self.reporter.evaluation(step, means)
        return means

    def save(self, step: int) -> Path:
        """Export the weights after `step` steps."""
        return self._export(Path(self.config.output_dir) / INTERMEDIATE / f"step-{step:08d}")

    def save_final(self) -> Path:
        """Export the trained weights."""
        return self._export(Path(self.config.output_dir) / FINAL)

    def _export(self, folder: Path) -> Path:
        export_engine(self.engine, self.tokenizer, folder, self.ranks.is_main)
        comm.barrier()
        self.reporter.say(f"weights: {folder}")
        return folder


def build_session(
    config: RunConfig,
    ranks: Ranks,
    hardware: Hardware,
    train_set: PairSource,
    eval_set: PairSource | None,
    stop_flag: StopFlag,
) -> Session:
    """Load the model and fill what the reference store lacks for the two sets.

    Raises:
        ConfigError: the model cannot be trained this way.
        NumericError: the reference gives log-probs that are not finite.
    """
    per_epoch = steps_per_epoch(len(train_set), config.train_batch_size)
    schedule = Schedule.of(config, per_epoch)
    reporter = Reporter(config, schedule.total_steps, ranks.is_main)
    engine = build_engine(config, ranks, hardware)
    reporter.say(describe(engine, config, ranks, hardware))
    reference_of = reference_source(config, ranks, hardware, engine, reporter.say)
    row_length = row_tokens(config, engine, hardware)  # a live reference takes its memory first

    def with_reference(pairs: PairSource, ids: np.ndarray) -> tuple[PairLoader, Reference]:
        loader = PairLoader(pairs, ranks, row_length, config.share_prefix)
        return loader, reference_of(loader, ids)

    used = pairs_of_steps(schedule.total_steps, len(train_set), config.train_batch_size, config.seed)
    loader, reference = with_reference(train_set, used)
    held_out = with_reference(eval_set, np.arange(len(eval_set))) if eval_set is not None else None
    reporter.say(
        f"{len(train_set)} pairs, {schedule.total_steps} steps of {config.train_batch_size} pairs, rows of at most "
        f"{row_length} tokens"
    )
    return Session(
        config=config,
        ranks=ranks,
        hardware=hardware,
        engine=engine,
        tokenizer=load_tokenizer(config.model_name_or_path),
        objective=objective_of(config),
        loader=loader,
        reference=reference,
        held_out=held_out,
        schedule=schedule,
        steps_per_epoch=per_epoch,
        reporter=reporter,
        stop_flag=stop_flag,
    )
