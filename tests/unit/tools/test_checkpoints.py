"""The list of a run's checkpoints, and what --prune leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsdpo.checkpoint.commit import checkpoints, commit, hashed_file, stage, step_folder
from dsdpo.errors import CheckpointError, ConfigError, IOFailure
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir
from dsdpo.tools.checkpoints import show


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, of which the middle one has a flipped bit, and what a killed save has left."""
    for step in (10, 20, 30):
        folder = step_folder(RunDir(tmp_path), step)
        staged = stage(folder)
        with hashed_file(staged / "rank-00000-of-00001.safetensors") as file:
            file.write(b"x" * 2048)
        commit(staged, folder, {"rank-00000-of-00001.safetensors": file.record}, {"step": step, "world_size": 1})
    (step_folder(RunDir(tmp_path), 20) / "rank-00000-of-00001.safetensors").write_bytes(b"y" + b"x" * 2047)
    stage(step_folder(RunDir(tmp_path), 40))
    return tmp_path


def test_the_list_is_cheap_and_verify_reads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(RunDir(run), verify_all=False, prune=None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["30", "20", "10"]
    assert "2.0 KiB" in lines[0] and "1 ranks" in lines[0] and "whole by size" in lines[1]
    assert "step-00000040.tmp: not a checkpoint" in lines[3]
    assert show(RunDir(run), verify_all=True, prune=None) == 66
    assert "NOT USABLE: rank-00000-of-00001.safetensors is damaged" in capsys.readouterr().out.splitlines()[1]


def test_prune_keeps_the_newest_and_removes_leftovers(run: Path) -> None:
    assert show(RunDir(run), verify_all=False, prune=2) == 0
    assert [checkpoint.step for checkpoint in checkpoints(RunDir(run))] == [30, 20]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]


def test_prune_never_goes_below_two(run: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        show(RunDir(run), verify_all=False, prune=1)


def test_prune_waits_for_no_running_job(run: Path) -> None:
    with RunLock.acquire(RunDir(run), "dsdpo train"), pytest.raises(IOFailure, match="in use by dsdpo train"):
        show(RunDir(run), verify_all=False, prune=2)


def test_a_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoints"):
        show(RunDir(tmp_path), verify_all=False, prune=None)
