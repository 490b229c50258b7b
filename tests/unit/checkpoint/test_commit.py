"""A checkpoint is whole or does not count, whatever happened while it was written or since."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dsdpo.checkpoint.commit import (
    MANIFEST,
    Checkpoint,
    checkpoints,
    clear_unfinished,
    commit,
    hashed_file,
    leftovers,
    read,
    retain,
    stage,
    step_folder,
    supersede_later,
    verify,
)
from dsdpo.errors import IOFailure
from dsdpo.runtime.rundir import RunDir

FILES = {
    "rank-00000-of-00002.safetensors": b"a" * 1000,
    "rank-00001-of-00002.safetensors": b"b" * 10,
    "run.json": b"{}",
}


def save(output_dir: Path, step: int) -> Path:
    folder = step_folder(RunDir(output_dir), step)
    staged = stage(folder)
    records = {}
    for name, content in FILES.items():
        with hashed_file(staged / name) as file:
            file.write(content[:5])
            file.write(content[5:])
        records[name] = file.record
    commit(staged, folder, records, {"step": step})
    return folder


def refuse(path: Path) -> bytes:
    """In place of a read."""
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def newest(output_dir: Path) -> Checkpoint | None:
    """What a run on one rank would go on from."""
    return next((checkpoint for checkpoint in checkpoints(RunDir(output_dir)) if not verify(checkpoint)), None)


def test_the_newest_is_the_one_with_the_most_steps(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (10, 300, 20):
        save(tmp_path, step)
    found = newest(tmp_path)
    assert found is not None and (found.step, found.manifest["step"]) == (300, 300)
    assert found.size == sum(map(len, FILES.values()))
    assert [checkpoint.step for checkpoint in checkpoints(RunDir(tmp_path))] == [300, 20, 10]


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
    assert verify(checkpoints(RunDir(tmp_path))[0])


def test_a_save_killed_halfway_leaves_the_earlier_ones(tmp_path: Path) -> None:
    """At every point: an empty folder, some files, all files without a manifest, all but the rename."""
    save(tmp_path, 1)
    staged = stage(step_folder(RunDir(tmp_path), 2))
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
        stage(step_folder(RunDir(tmp_path / "file"), 1))
    with pytest.raises(IOFailure), hashed_file(tmp_path / "missing" / "x"):
        pass


def test_retention_keeps_the_newest_sound_ones_and_the_forever_ones(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step)
    (step_folder(RunDir(tmp_path), 60) / "run.json").unlink()
    assert retain(RunDir(tmp_path), None, None) == []
    retain(RunDir(tmp_path), 2, 30)
    assert [checkpoint.step for checkpoint in checkpoints(RunDir(tmp_path))] == [70, 50, 30]
    (step_folder(RunDir(tmp_path), 70) / "run.json").unlink()
    retain(RunDir(tmp_path), 2, None)
    assert [checkpoint.step for checkpoint in checkpoints(RunDir(tmp_path))] == [70, 50, 30]
    retain(RunDir(tmp_path), 1, None)
    assert [checkpoint.step for checkpoint in checkpoints(RunDir(tmp_path))] == [70, 50]


@pytest.mark.parametrize("reads", ["read_bytes", "stat"])
def test_retention_leaves_what_could_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str) -> None:
    """An I/O error that passes costs no checkpoint: not that one, nor one that counts in its place."""
    for step in range(10, 60, 10):
        save(tmp_path, step)
    sound = getattr(Path, reads)
    victims = [
        step_folder(RunDir(tmp_path), step) / (MANIFEST if reads == "read_bytes" else "run.json") for step in (10, 40)
    ]

    def fail(path: Path, **arguments: bool) -> object:
        return refuse(path) if path in victims else sound(path, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Path, reads, fail)
        assert retain(RunDir(tmp_path), 2, None) == [step_folder(RunDir(tmp_path), 20)]
        found = checkpoints(RunDir(tmp_path))[1]
        assert found.uncertain and f"{victims[1].name} cannot be read: Input/output error" in found.problem
    assert [(c.step, verify(c)) for c in checkpoints(RunDir(tmp_path))] == [(50, ""), (40, ""), (30, ""), (10, "")]


def test_a_save_that_replaces_a_checkpoint_is_never_without_one(tmp_path: Path) -> None:
    """Killed when the old one has lost its name and the new one has none yet, the new one gets it."""
    save(tmp_path, 1)
    old = save(tmp_path, 2)
    staged = stage(old)
    for path in old.iterdir():
        (staged / path.name).write_bytes(path.read_bytes())
    old.rename(old.with_name(old.name + ".removed"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        clear_unfinished(RunDir(tmp_path))
    assert len(leftovers(RunDir(tmp_path))) == 2, "it could not be told"
    clear_unfinished(RunDir(tmp_path))
    assert [(c.step, verify(c)) for c in checkpoints(RunDir(tmp_path))] == [(2, ""), (1, "")] and not leftovers(
        RunDir(tmp_path)
    )


@pytest.mark.parametrize("point", ["all-written", "manifest-written", "before-rename", "renamed"])
def test_a_commit_that_replaces_a_checkpoint_can_be_killed_anywhere(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def kill(name: str) -> None:
        if name == f"save:{point}":
            raise SystemExit

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dsdpo.checkpoint.commit.fault_point", kill)
        with pytest.raises(SystemExit):
            save(tmp_path, 2)
    clear_unfinished(RunDir(tmp_path))
    assert [(c.step, verify(c)) for c in checkpoints(RunDir(tmp_path))] == [(2, ""), (1, "")]
    assert not leftovers(RunDir(tmp_path))
    save(tmp_path, 2)
    assert not leftovers(RunDir(tmp_path)), "the one that was replaced is removed"


def test_what_a_killed_save_has_left_is_removed_and_what_was_set_aside_stays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 5)
    (stage(step_folder(RunDir(tmp_path), 9)) / "rank-00000-of-00002.safetensors").write_bytes(b"half")
    for _ in range(2):  # the second time the name is taken
        supersede_later(RunDir(tmp_path), checkpoints(RunDir(tmp_path))[-1])
        save(tmp_path, 5)
    clear_unfinished(RunDir(tmp_path))
    names = [path.name for path in leftovers(RunDir(tmp_path))]
    assert names == ["step-00000005.superseded", "step-00000005.superseded-2"]
    assert not read(tmp_path / "checkpoints" / names[1]).problem, "nothing is lost"


def test_the_step_is_what_the_manifest_says(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    backup = folder.rename(folder.with_name("best"))
    assert (read(backup).step, read(backup).problem) == (7, "")
    assert "says step 7" in read(backup.rename(step_folder(RunDir(tmp_path), 8))).problem


def test_a_flipped_bit_in_the_manifest_is_seen(tmp_path: Path) -> None:
    manifest = save(tmp_path, 7) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"size": 1000', '"size": 1001'))
    assert "damaged" in checkpoints(RunDir(tmp_path))[0].problem
