"""What a start does with a checkpoint that the file system does not read just now."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dsdpo.checkpoint.commit import MANIFEST, checkpoints, commit, hashed_file, stage, step_folder
from dsdpo.checkpoint.resume import _read_surely
from dsdpo.errors import IOFailure
from dsdpo.runtime.rundir import RunDir


def test_it_is_neither_passed_over_nor_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        staged = stage(step_folder(RunDir(tmp_path), step))
        with hashed_file(staged / "run.json") as file:
            file.write(b"{}")
        commit(staged, step_folder(RunDir(tmp_path), step), {"run.json": file.record}, {"step": step})
    sound, newest = Path.read_bytes, step_folder(RunDir(tmp_path), 20)

    def read_bytes(path: Path) -> bytes:
        if path == newest / MANIFEST:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sound(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(IOFailure, match="Input/output error; the same command tries again"):
            _read_surely(newest)
    assert _read_surely(newest) == checkpoints(RunDir(tmp_path))[0]
