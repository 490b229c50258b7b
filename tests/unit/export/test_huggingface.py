"""Weights are on the disk before they get their name, and come from nothing that is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsdpo.checkpoint.commit import RUN_FILE, commit, hashed_file, stage, step_folder
from dsdpo.errors import CheckpointError, IOFailure
from dsdpo.export.huggingface import export, new_folder, set_aside
from dsdpo.runtime.rundir import RunDir


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "earlier").touch()
    with new_folder(tmp_path / "final") as folder:
        (folder / "more").mkdir()
        for name in ("weights", "more/tokenizer"):
            (folder / name).write_text(name)
    assert set(done[:-2]) == {f".final.tmp{name}" for name in ("", "/weights", "/more", "/more/tokenizer")}
    assert done[-2:] == ["rename", "."]
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["more", "weights"]


def test_a_folder_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(IOFailure, match="cannot write"), new_folder(tmp_path / "final"):
        raise OSError("no space")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_merging_a_checkpoint_with_a_damaged_description_is_66(tmp_path: Path) -> None:
    folder = step_folder(RunDir(tmp_path), 1)
    staged = stage(folder)
    with hashed_file(staged / RUN_FILE) as file:
        file.write(b'{"adapter_config": {"r": 8}}')
    commit(staged, folder, {RUN_FILE: file.record}, {"step": 1})
    (folder / RUN_FILE).write_bytes(b'{"adapter_confih": {"r": 8}}')
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        export(tmp_path, tmp_path / "to", merge=True)


def test_weights_of_before_are_set_aside_in_place_of_earlier_ones(tmp_path: Path) -> None:
    set_aside(RunDir(tmp_path))
    for content in ("first", "second"):
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / content).touch()
        set_aside(RunDir(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "final.superseded",
        "final.superseded/second",
    ]
