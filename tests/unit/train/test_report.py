"""The summary at the end of a run, from the files that it leaves."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from dsdpo import cli
from dsdpo.launch.task import Task, resume_command
from dsdpo.runtime.rundir import RunDir
from dsdpo.train.report import next_commands, summary


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """8 steps of 0.5 s each at 100, then 300 tokens per second."""
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir(Path("out") / "a run")
    run_dir.final.mkdir(parents=True)
    (run_dir.final / "adapter_config.json").touch()
    return run_dir


def write(run_dir: RunDir, evaluated: tuple[int, ...]) -> None:
    lines = []
    for step in range(1, 9):
        speed = 100 if step <= 4 else 300
        lines.append({"step": step, "loss": 1.0, "step_time": 0.5, "logical_tokens_per_second": speed})
        if step in evaluated:
            lines.append({"step": float(step), "eval_loss": 1 / step, "eval_rewards/accuracies": step / 10})
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_that_ended(run_dir: RunDir) -> None:
    write(run_dir, (2, 4, 8))
    lines = summary(run_dir, 0, 8, 8, 75.0)
    assert lines[1] == "finished: 8 steps in 01:15, 200 tokens/s"
    assert lines[2] == "held-out: loss 0.5000 -> 0.1250  accuracy 0.200 -> 0.800 (after steps 2 and 8)"
    assert lines[3] == f"weights: {run_dir.final}"


def test_a_run_that_was_resumed_says_both_times(run_dir: RunDir) -> None:
    write(run_dir, (8,))
    lines = summary(run_dir, 6, 8, 8, 3.0)
    assert lines[1] == "finished: 8 steps; this process took 2 of them in 00:03; all 8 steps 00:04, 200 tokens/s"
    assert lines[2] == "held-out: loss 0.1250  accuracy 0.800 (after step 8)"


def test_a_run_that_was_stopped_has_no_weights_to_use(run_dir: RunDir) -> None:
    write(run_dir, ())
    lines = summary(run_dir, 0, 8, 20, 4.0)
    assert lines[1:] == ["stopped after step 8 of 20 in 00:04, 200 tokens/s"]


@pytest.mark.parametrize("whole_model", [False, True])
def test_the_next_commands_can_be_pasted(run_dir: RunDir, whole_model: bool) -> None:
    if whole_model:
        (run_dir.final / "adapter_config.json").unlink()
    Path(f"{run_dir}-{'exported' if whole_model else 'merged'}").mkdir()
    chat, export = map(shlex.split, next_commands(run_dir))
    parser, _ = cli._parser()
    assert parser.parse_args(chat[chat.index("chat") :]).model == str(run_dir)
    parsed = parser.parse_args(export[export.index("export") :])
    assert (parsed.output_dir, parsed.merge) == (str(run_dir), not whole_model)
    assert not Path(parsed.to).exists()


def test_a_stopped_training_goes_on_with_the_command_as_typed() -> None:
    typed = ("train", "a run.yaml", "--num_accelerators", "2", "--fresh", "--yes", "--beta=0.2")
    words = shlex.split(resume_command(Task("train", "a run.yaml", [], typed=typed)))
    assert words[words.index("train") :] == ["train", "a run.yaml", "--num_accelerators", "2", "--beta=0.2"]
