"""What a run says at its end: a summary with the next commands, or which examples gave a number that is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.data.loader import ExampleSource
from dsdpo.export.huggingface import adapter_remark
from dsdpo.runtime.collectives import all_gather_object
from dsdpo.runtime.command import command_line
from dsdpo.runtime.progress import format_interval
from dsdpo.runtime.rundir import RunDir
from dsdpo.train.metrics import StepTotals, brief
from dsdpo.train.step import QueuedStep

_NAMED = 8  # examples that an error about numbers names


def summary(run_dir: RunDir, first_step: int, done: int, total: int, seconds: float, answers: bool = True) -> list[str]:
    """Time, steps, held-out figures, where the weights are, and the next two commands; for a run that was stopped, its
    checkpoint in place of these.

    Args:
        first_step: steps that earlier processes took.
        done: steps that have been taken.
        total: steps of the run.
        seconds: that this process trained, with evaluations and saves.
        answers: whether the model answers; a reward model does not.
    """
    steps, evaluations = _records(run_dir)
    lines = ["", f"{_steps(first_step, done, total, seconds)}{_speed(steps, first_step)}"]
    if evaluations:
        lines.append(f"held-out: {_held_out(evaluations)}")
    if done < total:
        found = [checkpoint.path for checkpoint in checkpoints(run_dir) if not checkpoint.problem]
        return [*lines, *(f"checkpoint: {path}" for path in found[:1])]
    lines += [f"weights: {run_dir.final}", *filter(None, [adapter_remark(run_dir.final)])]
    return [*lines, "next:", *(f"  {command}" for command in next_commands(run_dir, answers))]


def _records(run_dir: RunDir) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of metrics.jsonl: those of steps, and those of evaluations."""
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    return [r for r in records if "step_time" in r], [r for r in records if "eval_loss" in r]


def _steps(first_step: int, done: int, total: int, seconds: float) -> str:
    whole = f"finished: {done} steps" if done == total else f"stopped after step {done} of {total}"
    if first_step == 0:
        return f"{whole} in {format_interval(seconds)}"
    return f"{whole}; this process took {done - first_step} of them in {format_interval(seconds)}"


def _speed(steps: list[dict[str, Any]], first_step: int) -> str:
    """Of all steps, those of earlier processes too."""
    seconds = sum(r["step_time"] for r in steps)
    if not seconds:
        return ""
    tokens = sum(r["logical_tokens_per_second"] * r["step_time"] for r in steps)
    in_all = f"; all {len(steps)} steps {format_interval(seconds)}" if first_step else ""
    return f"{in_all}, {tokens / seconds:.0f} tokens/s"


def _held_out(evaluations: list[dict[str, Any]]) -> str:
    """Figures of the first and of the last evaluation."""
    first, last = evaluations[0], evaluations[-1]
    before, after = ({key.removeprefix("eval_"): value for key, value in r.items()} for r in (first, last))
    if first is last:
        figures = [f"{name} {value}" for name, value in brief(after).items()]
        return f"{'  '.join(figures)} (after step {last['step']:.0f})"
    figures = [f"{name} {brief(before)[name]} -> {value}" for name, value in brief(after).items()]
    return f"{'  '.join(figures)} (after steps {first['step']:.0f} and {last['step']:.0f})"


def next_commands(run_dir: RunDir, answers: bool = True) -> list[str]:
    """What a user may do next with the weights of a run that has ended, as it can be pasted into a shell."""
    has_adapter = (run_dir.final / "adapter_config.json").exists()
    target = f"{run_dir}-{'merged' if has_adapter else 'exported'}"
    taken = 1
    while Path(to := target if taken == 1 else f"{target}-{taken}").exists():
        taken += 1
    ask = ["chat", str(run_dir), *(["--compare"] if has_adapter else [])] if answers else ["eval", str(run_dir)]
    export = ["export", str(run_dir), *(["--merge"] if has_adapter else []), "--to", to]
    return [command_line(ask), command_line(export)]


def not_finite(step: QueuedStep, totals: StepTotals, source: ExampleSource) -> str:
    """Name the step and the examples. A collective call: every rank knows only its own losses."""
    batch = step.batch
    mine: list[int] = []
    for micro_batch, losses in zip(batch.micro_batches, step.sums.per_example):
        bad = micro_batch.examples[(~torch.isfinite(losses)).cpu().numpy()]
        mine += batch.example_ids[bad].tolist()
    everyone = all_gather_object(mine)
    if totals.bad_losses:
        found = f"the loss of {totals.bad_losses} examples is not finite"
        ids = sorted(i for part in everyone for i in part)
    else:
        found = f"the gradient norm is {totals.grad_norm}, every loss is finite"
        ids = sorted(batch.example_ids.tolist())
    named = ", ".join(f"{i} ({source.where(i)})" for i in ids[:_NAMED])
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return (
        f"step {step.done}: {found}; example ids {named}{more}. Nothing was saved after it. "
        f"{_in_fp16(step.scaling, totals)}"
        "A lower learning_rate, a longer warmup_ratio or fp32 may help; so may a look at these examples"
    )


def _in_fp16(scaling: dict[str, float], totals: StepTotals) -> str:
    """What fp16 has to do with numbers that are not finite; empty for other precisions."""
    if not scaling:
        return ""
    if totals.bad_losses:
        return (
            "The largest number of fp16 is 65504, and no loss scale changes a loss: begin a run with precision: bf16 "
            "where the GPUs have it, or fp32. "
        )
    return (
        f"The gradients overflow in fp16 at loss scale {scaling['loss_scale']:g}, and fp16.min_loss_scale (or a "
        "constant fp16.loss_scale) of the DeepSpeed JSON allows no lower one: lower it there, or begin a run with "
        "precision: bf16 where the GPUs have it, or fp32. "
    )
