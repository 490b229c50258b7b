"""The command line: fast help, exit codes without tracebacks, one report however many ranks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dsdpo import __version__, cli

ROOT = Path(__file__).parents[2]
COMMANDS = ["train", "prepare", "reference", "eval", "export", "import-checkpoint", "chat", "plot"]
FAULTY = "model_name_or_path: ./nowhere\ndataset: d\ndataset_dir: no_folder\noutput_dir: o\nbeta: 0\nsede: 1\n"


def dsdpo(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "dsdpo", *arguments],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_takes_less_than_a_second() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = dsdpo("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor, whatever else runs
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert result.returncode == 0
    assert {*COMMANDS} <= {*result.stdout.split()}
    assert min(times) < 1.0


def test_version() -> None:
    assert dsdpo("--version").stdout == f"dsdpo {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    listed = "label_smoothing (a number" in capsys.readouterr().out
    assert listed == (command in ("train", "prepare", "reference", "eval"))


@pytest.mark.parametrize("command", ["train", "prepare", "reference"])
def test_faults_are_one_report_with_exit_64(tmp_path: Path, command: str) -> None:
    (tmp_path / "run.yaml").write_text(FAULTY)
    result = dsdpo(command, "run.yaml", "--seed", cwd=tmp_path)
    assert result.returncode == 64
    assert f"dsdpo {command}: 5 problems in the run config:" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    "arguments", [("--local_rank=0", "train", "run.yaml"), ("train", "run.yaml", "--local_rank=0")]
)
def test_the_main_rank_prints_the_report_at_once(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Launchers add --local_rank: `deepspeed` behind the module's name, others at the end."""
    (tmp_path / "run.yaml").write_text(FAULTY)
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    result = dsdpo(*arguments, cwd=tmp_path, **place)
    assert result.returncode == 64 and "4 problems in the run config" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tune", "run.yaml"],
        ["train"],
        ["export", "out"],
        ["import-checkpoint", "checkpoint-500"],
        ["eval", "run.yaml"],
        ["plot", "out", "--beta", "1"],
        ["train", "run.yaml", "--num_accelerators", "many"],
    ],
)
def test_a_wrong_command_line_is_exit_64(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 64
    assert "usage: dsdpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plot", "no_such_folder"], 66),
        (["export", "no_such_folder", "--to", "x"], 66),
        (["import-checkpoint", "no_such_folder", "--to", "x"], 66),
        (["chat", "m", "--prompts", "no_such_file"], 64),
        (["train", "no_such.yaml"], 64),
    ],
)
def test_a_missing_file_is_told_without_traceback(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    assert "no_such" in capsys.readouterr().err


def test_launch_arguments_and_options_may_stand_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FAULTY)
    result = dsdpo("train", "run.yaml", "--beta", "0.2", "--num_accelerators", "0", "--sede=2", cwd=tmp_path)
    assert "--num_accelerators is 0" in result.stderr
    assert "command line: unknown option sede" in result.stderr
    assert "beta is" not in result.stderr
