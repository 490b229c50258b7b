"""`dsdpo files` writes what comes with dsdpo, and overwrites nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dsdpo import cli
from dsdpo.errors import CommandLineError
from dsdpo.runtime.shipped import SHIPPED, root, shipped_files
from dsdpo.tools.shipped import write_files

ROOT = Path(__file__).parents[3]


def test_what_git_tracks_there_comes_with_dsdpo() -> None:
    line = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SHIPPED]
    tracked = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert root() == ROOT and {"configs", "ds_configs", "launch", "slurm"} <= set(SHIPPED)
    assert {str(file) for file in shipped_files(ROOT)} == {name for name in tracked.split("\0") if name}


def test_the_files_are_written_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "folder"
    assert cli.main(["files", "--to", str(target)]) == 0
    said = capsys.readouterr().out.splitlines()
    files = shipped_files(ROOT)
    assert said[:-1] == [str(target / file) for file in files] and str(len(files)) in said[-1]
    for file in files:
        assert (target / file).read_bytes() == (ROOT / file).read_bytes()
        assert os.access(target / file, os.X_OK) == (target / file).read_bytes().startswith(b"#!"), file


def test_again_writes_what_is_missing(tmp_path: Path) -> None:
    files = shipped_files(ROOT)
    assert write_files(tmp_path) == (files, [])
    (tmp_path / files[0]).unlink()
    assert write_files(tmp_path) == (files[:1], files[1:])


def test_other_files_stay_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm" / "train.sbatch").mkdir(parents=True)
    (tmp_path / "constraints.txt").write_text("mine\n")
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CommandLineError) as caught:
        write_files(tmp_path)
    assert [(problem.code, problem.option) for problem in caught.value.problems] == [("file-exists", "--to")] * 3
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "constraints.txt").read_text() == "mine\n"
    assert cli.main(["files", "--to", str(tmp_path)]) == 64
    assert "constraints.txt" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_74(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["files", "--to", str(tmp_path / "file")]) == 74
