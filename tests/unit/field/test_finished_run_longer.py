"""A finished run that is given more steps: what is asked for again, what goes on, and what one message says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.checkpoint.commit import RUN_FILE, commit, hashed_file, stage, step_folder
from dsdpo.checkpoint.continuing import earlier_run_problem, is_finished, reopen
from dsdpo.config.load import load
from dsdpo.config.schema import RunConfig
from dsdpo.errors import CheckpointError
from dsdpo.runtime.rundir import RunDir

EXAMPLES = 6  # with 4 a step, an epoch has two steps
BASE = {"model_name_or_path": "m", "dataset": ["d"], "train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-5}


def config(folder: Path, *arguments: str, **options: Any) -> RunConfig:
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE | {"output_dir": str(folder / "out")} | options))
    loaded = load(folder / "run.yaml", arguments)
    assert loaded.config is not None and not loaded.problems, loaded.problems
    return loaded.config


def finish(folder: Path, step: int = 2, checkpoint: bool = True, **options: Any) -> RunDir:
    """What a run of so many steps leaves, by its looks."""
    run, run_dir = config(folder, **options), RunDir(folder / "out")
    run_dir.path.mkdir()
    run_dir.run_config.write_text(yaml.safe_dump(run.model_dump(), sort_keys=False))
    run_dir.completed.touch()
    if checkpoint:
        target = step_folder(run_dir, step)
        staged = stage(target)
        with hashed_file(staged / RUN_FILE) as file:
            said = {"config": run.model_dump(mode="json"), "resumed_from": None, "order": {"examples": EXAMPLES}}
            file.write(json.dumps(said).encode())
        commit(staged, target, {RUN_FILE: file.record}, {"step": step})
    return run_dir


CONSENT = ["--change_on_resume", "max_steps"]
FOR_EPOCHS = ["--change_on_resume", "num_train_epochs"]
FOR_BOTH = ["--change_on_resume", "max_steps,learning_rate"]
NO_STEP = "no step is left to train"
BY_EPOCHS = {"max_steps": None, "num_train_epochs": 1.0}

# what is finished, arguments of the next command, and how that ends: done, on, or a part of the refusal
TABLE: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "the same command": ({}, [], "done"),
    "consent without a change": ({}, CONSENT, "done"),
    "reports change": ({}, ["--logging_steps", "7", "--run_name", "5e-6"], "done"),
    "more steps, no consent": ({}, ["--max_steps", "4"], "name it in change_on_resume to go on with 4"),
    "more steps": ({}, ["--max_steps", "4", *CONSENT], "on"),
    "one more step": ({}, ["--max_steps", "3", "--change_on_resume=max_steps"], "on"),
    "fewer steps": ({}, ["--max_steps", "1", *CONSENT], NO_STEP),
    "steps instead of epochs": (BY_EPOCHS, ["--max_steps", "5", *CONSENT], "on"),
    "as many steps as the epochs had": (BY_EPOCHS, ["--max_steps", "2", *CONSENT], NO_STEP),
    "more epochs": (BY_EPOCHS, ["--num_train_epochs", "2", *FOR_EPOCHS], "on"),
    "half an epoch more": (BY_EPOCHS, ["--num_train_epochs", "1.5", *FOR_EPOCHS], "on"),
    "more epochs, no consent": (BY_EPOCHS, ["--num_train_epochs", "2"], "name it in change_on_resume to go on with 2"),
    "more epochs where max_steps decides": ({}, ["--num_train_epochs", "9", *FOR_EPOCHS], NO_STEP),
    "more steps and another rate": ({}, ["--max_steps", "4", "--learning_rate", "1e-4", *FOR_BOTH], "on"),
    "another rate alone": ({}, ["--learning_rate", "1e-4", *FOR_BOTH], NO_STEP),
    "more steps, another seed": ({}, ["--max_steps", "4", "--seed", "7", *CONSENT], "seed was 42, now it is 7"),
    "another checkpoint by name": ({}, ["--resume_from_checkpoint", "x"], "resume_from_checkpoint is set"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_what_follows_a_finished_run(tmp_path: Path, name: str) -> None:
    options, arguments, end = TABLE[name]
    run_dir = finish(tmp_path, **options)
    asked = config(tmp_path, *arguments, **options)
    problem = earlier_run_problem(asked)
    if end not in ("done", "on"):
        assert end in problem
        with pytest.raises(CheckpointError) as caught:
            reopen(asked)
        assert caught.value.exit_code == 66 and run_dir.completed.exists()
        return
    assert not problem
    assert is_finished(asked) == (end == "done")
    if end == "on":
        reopen(asked)
        assert not run_dir.completed.exists() and not is_finished(asked)
        assert not earlier_run_problem(asked), "the same command resumes after a kill"
        assert not earlier_run_problem(config(tmp_path, **options)), "and so does the one that had finished"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_without_a_checkpoint_cannot_go_on(tmp_path: Path, steps: int) -> None:
    finish(tmp_path, checkpoint=False, save_steps=None)
    asked = config(tmp_path, "--max_steps", str(steps), *CONSENT, save_steps=None)
    assert ("without a checkpoint" in earlier_run_problem(asked)) == (steps != 2)
