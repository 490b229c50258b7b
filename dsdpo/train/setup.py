"""What one rank sets up before the training loop, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedTokenizerBase

from dsdpo.checkpoint.resume import NO_RESUME_POINT, ResumePoint, find_resume_point, restore
from dsdpo.checkpoint.run_metadata import identity, run_metadata
from dsdpo.checkpoint.saver import Saver
from dsdpo.compat import set_end_ids
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.exported import ExportedTemplate
from dsdpo.data.loader import BatchLoader, ExampleSource
from dsdpo.data.order import Order
from dsdpo.data.templates import load_tokenizer
from dsdpo.engine.engine import Hardware, build_engine, describe
from dsdpo.engine.loss_scale import LossScale, StepScaling
from dsdpo.engine.row_tokens import Rows, find_rows
from dsdpo.model.recompute import recompute_layers
from dsdpo.objectives.base import Objective
from dsdpo.objectives.stages import objective_of
from dsdpo.reference.source import Reference, reference_source
from dsdpo.runtime.collectives import run_on_main
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.row_limit import read_row_limit
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.runtime.watchdog import Watch
from dsdpo.train.metrics import Reporter
from dsdpo.train.run import Run
from dsdpo.train.schedule import Schedule


def set_up(
    config: RunConfig,
    zero: ZeroConfig,
    mesh: Mesh,
    hardware: Hardware,
    train_set: ExampleSource,
    eval_set: ExampleSource | None,
    stop_flag: StopFlag,
    watchdog: Watch | None = None,
    trains: bool = True,
) -> Run:
    """Load the model, fill what the reference store lacks for the two sets, and put back what a checkpoint holds.

    Args:
        watchdog: over this rank. None: nobody watches.
        trains: False to fill the store alone, which leaves the checkpoints and metrics of output_dir as they are.

    Raises:
        ConfigError: the model cannot be trained this way.
        CheckpointError: output_dir holds checkpoints, and none can be continued by this run.
        NumericError: the reference gives log-probs that are not finite.
        IOFailure: there is no room for a checkpoint.
    """
    order = Order.of(train_set.sizes, config.mix_strategy, config.interleave_probs)
    schedule, objective = Schedule.of(config, order.steps_per_epoch(config.train_batch_size)), objective_of(config)
    # Before the resume point, whose identity hashes the weights: it fetches those of a hub id.
    engine = build_engine(config, zero, mesh, hardware, head=objective.head)
    point = find_resume_point(config, mesh, identity(config, mesh, hardware, train_set)) if trains else NO_RESUME_POINT
    reporter = Reporter(config, schedule.total_steps, mesh.is_main, point.step if trains else None)
    for line in (*point.remarks, describe(engine, config, zero, mesh, hardware)):
        reporter.say(line)
    load = _Loaders(config, zero, mesh, hardware, engine, objective, point, reporter, stop_flag, train_set, eval_set)
    loader, reference = load(train_set, order.ids_of_steps(schedule.total_steps, config.train_batch_size, config.seed))
    held_out = None if eval_set is None else load(eval_set, np.arange(len(eval_set)))
    watchdog = watchdog or Watch(RunDir(Path(config.output_dir)), mesh, config.hang_timeout, None)
    tokenizer, metadata = _metadata(config, mesh, engine, train_set, len(order), load.rows)
    saver, scaling = _saver(config, zero, mesh, hardware, engine, point, metadata, reporter, watchdog.token, load.rows)
    if trains and config.save_steps is not None and point.step < schedule.total_steps:
        saver.check_room()
    reporter.say(f"{len(train_set)} examples, {schedule.total_steps} steps of {config.train_batch_size}, {load.rows}")
    return Run(
        config=config,
        mesh=mesh,
        hardware=hardware,
        engine=engine,
        scaling=scaling,
        tokenizer=tokenizer,
        objective=objective,
        loader=loader,
        rows=load.rows,
        reference=reference,
        held_out=held_out,
        schedule=schedule,
        order=order,
        reporter=reporter,
        stop_flag=stop_flag,
        first_step=point.step,
        saver=saver,
        watchdog=watchdog,
    )


def _metadata(
    config: RunConfig, mesh: Mesh, engine: DeepSpeedEngine, train_set: ExampleSource, epoch: int, rows: Rows
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The tokenizer to export, and what checkpoints say of the run.

    The tokenizer gets the chat template and the end token of the run; so does the model's generation config.
    """
    tokenizer = load_tokenizer(*config.model_source.place())
    exported = ExportedTemplate.of(tokenizer, config, train_set.end_token, train_set.template_date)
    model = engine.module.model
    generation = getattr(model, "generation_config", None)  # a reward model generates nothing
    if generation is not None:
        set_end_ids(model, exported.end_ids(tokenizer, generation.eos_token_id))
    exported.put_into(tokenizer)
    if exported.pad_token is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, {**run_metadata(config, mesh, engine, train_set, epoch, rows), "exported": asdict(exported)}


class _Loaders:
    """Makes the loader and the reference of a set."""

    def __init__(
        self,
        config: RunConfig,
        zero: ZeroConfig,
        mesh: Mesh,
        hardware: Hardware,
        engine: DeepSpeedEngine,
        objective: Objective,
        point: ResumePoint,
        reporter: Reporter,
        stop_flag: StopFlag,
        train_set: ExampleSource,
        eval_set: ExampleSource | None,
    ) -> None:
        self._config, self._mesh = config, mesh
        kind = config.reference_kind if objective.needs_reference else "none"
        self._reference_of = reference_source(kind, config, zero, mesh, hardware, engine, reporter.say, stop_flag)
        # A live reference takes its memory first.
        sets = [train_set] if eval_set is None else [train_set, eval_set]
        self.rows = _rows(config, mesh, hardware, engine, point, reporter.say, sets)

    def __call__(self, source: ExampleSource, ids: np.ndarray) -> tuple[BatchLoader, Reference]:
        """Of a set, of which `ids` will be asked for."""
        config = self._config
        alpha = config.neftune_noise_alpha or 0.0
        loader = BatchLoader(source, self._mesh, self.rows.tokens, config.share_prefix, alpha)
        return loader, self._reference_of(loader, ids)


def _rows(
    config: RunConfig,
    mesh: Mesh,
    hardware: Hardware,
    engine: DeepSpeedEngine,
    point: ResumePoint,
    say: Callable[[str], None],
    sets: list[ExampleSource],
) -> Rows:
    """How long rows are: as before on as many ranks, which gives the same steps to the bit, and no longer than what an
    earlier start has recorded when it ran out of memory. What layers compute again is set here where memory decides.
    A collective call."""
    tokens = [source.lengths(np.arange(len(source))).packed(config.share_prefix) for source in sets]
    least = max(int(some.max(initial=0)) for some in tokens)
    mean_step = int(tokens[0].mean() * config.train_batch_size / mesh.dp_size)
    rows = find_rows(config, engine, hardware, least, mean_step)
    if config.gradient_checkpointing == "auto":
        model = engine.module.model
        recompute_layers(model.get_base_model() if hasattr(model, "get_base_model") else model, rows.recompute)
    if rows.remark:
        say(rows.remark)
    if rows.found and (before := point.row_tokens(mesh, rows.facts, rows.tokens)) is not None:
        rows.tokens, rows.is_estimate = before, False
    run_dir = RunDir(Path(config.output_dir))
    limit = run_on_main(mesh.is_main, lambda: read_row_limit(run_dir))
    if limit is not None and limit < rows.tokens:
        limit = max(limit, least)
        say(
            f"rows of at most {limit} tokens instead of {rows.tokens}, as an earlier start ran out of memory; to "
            f"forget that, delete {run_dir.row_limit}"
        )
        rows.tokens, rows.is_estimate = limit, False
    return rows


def _saver(
    config: RunConfig,
    zero: ZeroConfig,
    mesh: Mesh,
    hardware: Hardware,
    engine: DeepSpeedEngine,
    point: ResumePoint,
    metadata: dict[str, Any],
    reporter: Reporter,
    token: str | None,
    rows: Rows,
) -> tuple[Saver, StepScaling]:
    """Makes checkpoints of an engine, which gets its state and, in fp16, its loss scale back here.

    That comes after the reference, which the untrained policy may have had to compute.
    """
    if point.checkpoint is not None:
        restore(engine, point.checkpoint, config, mesh)
        reporter.say(f"resumed after step {point.step} from {point.checkpoint.path}")
    loss_scale = None
    if hardware.precision == "fp16":
        saved = point.run.get("loss_scale")
        loss_scale = LossScale.saved(zero.scale_rule, saved) if saved else LossScale.first(zero.scale_rule)
    scaling = StepScaling(engine, hardware.device, loss_scale)

    def changing() -> dict[str, Any]:
        return {**scaling.state, "row_tokens": rows.tokens}

    return Saver(config, engine, mesh, {**point.identity, **metadata}, reporter.say, token, changing), scaling
