"""Whether a run can go on from what output_dir holds, told before anything is launched; no weights are read.

A finished run goes on where it is given more steps with consent. Its mark COMPLETED goes first, before a launcher
starts: from then on the folder is that of a run which was interrupted after its last checkpoint, and whatever ends the
next attempt, the same command resumes there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from dsdpo.checkpoint.commit import RUN_FILE, Checkpoint, none_usable, read_run, resume_candidates, verify
from dsdpo.checkpoint.identity import config_diff, refusal
from dsdpo.config.schema import RunConfig
from dsdpo.data.order import steps_per_epoch
from dsdpo.errors import CheckpointError
from dsdpo.runtime.files import fsync_path
from dsdpo.runtime.rundir import RunDir

_OTHERWISE = "Choose another output_dir, or begin again with --fresh"


def earlier_run_problem(config: RunConfig) -> str:
    """Why the run in output_dir, or the checkpoint that is named, cannot be continued; empty where it can, or where
    there is none."""
    if RunDir(Path(config.output_dir)).completed.exists():
        return _finished_run(config)
    return _checkpoint(config)[1]


def is_finished(config: RunConfig) -> bool:
    """Whether output_dir holds this run, finished, and nothing is asked of it that it has not done."""
    return RunDir(Path(config.output_dir)).completed.exists() and not _changes(config)


def reopen(config: RunConfig) -> None:
    """Let a finished run go on: whoever calls it holds the lock of output_dir.

    Raises:
        CheckpointError: another run has finished there since the check.
    """
    run_dir = RunDir(Path(config.output_dir))
    if run_dir.completed.exists():
        if problem := earlier_run_problem(config):
            raise CheckpointError(problem)
        run_dir.completed.unlink(missing_ok=True)
        fsync_path(run_dir.path)


def total_steps(settings: dict[str, Any], examples: int) -> int:
    """Optimizer steps of a run.

    Args:
        settings: option -> value.
        examples: of an epoch.
    """
    per_epoch = steps_per_epoch(examples, settings["train_batch_size"])
    return settings["max_steps"] or math.ceil(settings["num_train_epochs"] * per_epoch)


def _checkpoint(config: RunConfig) -> tuple[Checkpoint | None, str]:
    """The checkpoint that the run goes on from, or why it cannot; neither where the ranks must look again."""
    faults = []
    for checkpoint in resume_candidates(config):
        if checkpoint.uncertain:  # the ranks look again, and tell
            return None, ""
        problem = verify(checkpoint, [RUN_FILE])
        if not problem:
            saved = read_run(checkpoint.path)["config"]
            lines = config_diff(saved, config.model_dump(mode="json"), config.change_on_resume)
            return checkpoint, refusal(str(checkpoint.path), lines) if lines else ""
        faults.append(f"{checkpoint.path.name}: {problem}")
    return None, str(none_usable(config, faults)) if faults else ""


def _saved(config: RunConfig) -> dict[str, Any]:
    """What run_config.yaml of output_dir says; empty where it cannot be read."""
    try:
        found = yaml.safe_load(RunDir(Path(config.output_dir)).run_config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _changes(config: RunConfig) -> bool:
    """Whether a run differs from the finished one in output_dir."""
    saved = _saved(config)
    return bool(saved) and bool(config_diff(saved, config.model_dump(mode="json"), []))


def _finished_run(config: RunConfig) -> str:
    """Why the finished run in output_dir is not this one, nor one that goes on with more steps."""
    saved = _saved(config)
    if not saved:
        return ""
    lines = config_diff(saved, config.model_dump(mode="json"), config.change_on_resume)
    if lines or config.resume_from_checkpoint:
        named = "resume_from_checkpoint is set" if config.resume_from_checkpoint else ""
        return (
            f"output_dir: {config.output_dir} holds a finished run, and this is another one: "
            f"{'; '.join(filter(None, [*lines, named]))}. {_OTHERWISE}"
        )
    return _no_steps_left(config) if _changes(config) else ""


def _no_steps_left(config: RunConfig) -> str:
    """Why a finished run cannot go on with the changes that `change_on_resume` names; empty where it can."""
    checkpoint, problem = _checkpoint(config)
    if problem:
        return problem
    finished = f"output_dir: {config.output_dir} holds a finished run"
    if checkpoint is None:
        return f"{finished}, without a checkpoint to go on from (save_steps was empty). {_OTHERWISE}"
    order = read_run(checkpoint.path).get("order", {})
    examples = order.get("epoch", order.get("examples"))
    if examples is None:
        return ""
    total = total_steps(config.model_dump(), examples)
    if total > checkpoint.step:
        return ""
    return (
        f"{finished} of {checkpoint.step} steps, and this one has {total}: no step is left to train. Set max_steps or "
        f"num_train_epochs above that, and name it in change_on_resume. {_OTHERWISE}"
    )
