"""A checkpoint is whole or does not count, whatever happened while it was written or since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsdpo.checkpoint.commit import (
    MANIFEST,
    Checkpoint,
    checkpoints,
    commit,
    hashed_file,
    retain,
    stage,
    step_folder,
    verify,
)
from dsdpo.errors import IOFailure

FILES = {
    "rank-00000-of-00002.safetensors": b"a" * 1000,
    "rank-00001-of-00002.safetensors": b"b" * 10,
    "run.json": b"{}",
}


def save(output_dir: Path, step: int) -> Path:
    folder = step_folder(output_dir, step)
    staged = stage(folder)
    records = {}
    for name, content in FILES.items():
        with hashed_file(staged / name) as file:
            file.write(content[:5])
            file.write(content[5:])
        records[name] = file.record
    commit(staged, folder, records, {"step": step})
    return folder


def newest(output_dir: Path) -> Checkpoint | None:
    """What a run on one rank would go on from."""
    return next((checkpoint for checkpoint in checkpoints(output_dir) if not verify(checkpoint)), None)


def test_the_newest_is_the_one_with_the_most_steps(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (10, 300, 20):
        save(tmp_path, step)
    found = newest(tmp_path)
    assert found is not None and (found.step, found.manifest["step"]) == (300, 300)
    assert found.size == sum(map(len, FILES.values()))
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [300, 20, 10]


@pytest.mark.parametrize("harm", ["gone", "short", "flipped", "no manifest", "half a manifest", "other format"])
def test_a_harmed_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    victim, manifest = folder / "rank-00000-of-00002.safetensors", folder / MANIFEST
    if harm == "gone":
        victim.unlink()
    elif harm == "short":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "flipped":
        victim.write_bytes(b"c" + victim.read_bytes()[1:])
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    found = newest(tmp_path)
    assert found is not None and found.step == 1
    assert verify(checkpoints(tmp_path)[0])


def test_a_save_killed_halfway_leaves_the_earlier_ones(tmp_path: Path) -> None:
    """At every point: an empty folder, some files, all files without a manifest, all but the rename."""
    save(tmp_path, 1)
    staged = stage(step_folder(tmp_path, 2))
    for name, content in {**FILES, MANIFEST: b"{}"}.items():
        found = newest(tmp_path)
        assert found is not None and found.step == 1
        (staged / name).write_bytes(content)
    save(tmp_path, 2)
    found = newest(tmp_path)
    assert found is not None and found.step == 2 and not staged.exists()


def test_a_refused_write_is_exit_74(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IOFailure):
        stage(step_folder(tmp_path / "file", 1))
    with pytest.raises(IOFailure), hashed_file(tmp_path / "missing" / "x"):
        pass


def test_retention_keeps_two_sound_ones_and_the_forever_ones(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step)
    (step_folder(tmp_path, 60) / "run.json").unlink()
    assert retain(tmp_path, None, None) == []
    retain(tmp_path, 1, 30)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [70, 50, 30]
    (step_folder(tmp_path, 70) / "run.json").unlink()
    retain(tmp_path, 2, None)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [70, 50, 30]
