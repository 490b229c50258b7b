"""Checkpoints that are whole or do not count.

A checkpoint is written as `checkpoints/step-00000300.tmp/`, every file fsynced and hashed while it is written. Its
MANIFEST.json, with size and sha256 of every file, comes last; then the folder is renamed and its parent fsynced. Which
checkpoint is the newest is computed from manifests, never read from a pointer file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dsdpo.config.schema import RunConfig
from dsdpo.errors import CheckpointError, IOFailure
from dsdpo.runtime.faults import fault_point
from dsdpo.runtime.files import fsync_path, write_atomically
from dsdpo.runtime.progress import Progress
from dsdpo.runtime.rundir import RunDir

MANIFEST = "MANIFEST.json"
RUN_FILE = "run.json"
_FORMAT = 1
_STAGED = ".tmp"
_REMOVED = ".removed"
SUPERSEDED = ".superseded"
_NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """One folder under `checkpoints/`.

    Attributes:
        path: the folder.
        step: optimizer steps taken.
        manifest: what MANIFEST.json holds; empty when it cannot be used.
        problem: why it does not count, or an empty string.
        uncertain: whether it may be whole all the same: the file system could not read it this time.
    """

    path: Path
    step: int
    manifest: dict[str, Any]
    problem: str
    uncertain: bool = False

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(record["size"] for record in self.manifest.get("files", {}).values())


def step_folder(run_dir: RunDir, step: int) -> Path:
    """Where the checkpoint after `step` steps stands once it is committed."""
    return run_dir.checkpoints / f"step-{step:08d}"


def stage(folder: Path) -> Path:
    """An empty folder beside the final one, for its files; what a killed save left there is removed."""
    staged = folder.with_name(folder.name + _STAGED)
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    except OSError as error:
        remedy = "free space or choose another output_dir"
        raise IOFailure(f"cannot make {staged}: {error.strerror or error}; {remedy}") from error
    return staged


class HashedFile:
    """A file that is hashed as it is written. `record` holds once it is closed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._digest.update(data)
        self._size += self._stream.write(data)

    @property
    def record(self) -> FileRecord:
        """Size and sha256 of what has been written."""
        return FileRecord(self._size, self._digest.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Write a new file, fsynced at the end.

    Raises:
        IOFailure: the file system refused.
    """
    try:
        with path.open("xb") as stream:
            file = HashedFile(stream)
            yield file
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise IOFailure(
            f"cannot write {path}: {error.strerror or error}; free space or choose another output_dir"
        ) from error


def commit(staged: Path, folder: Path, files: dict[str, FileRecord], facts: dict[str, Any]) -> None:
    """Make a staged checkpoint count: manifest, rename, fsync of the parent.

    Args:
        staged: of `stage`, with every file of all ranks in it.
        folder: its final name.
        files: what the writers of the files have hashed.
        facts: further entries of the manifest; JSON.
    """
    fault_point("save:all-written")
    manifest = {"format": _FORMAT, **facts, "files": {name: asdict(record) for name, record in sorted(files.items())}}
    write_atomically(staged / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}))
    fault_point("save:manifest-written")
    try:
        replaced = _take_name(folder)
        fault_point("save:before-rename")
        os.rename(staged, folder)
        fault_point("save:renamed")
        fsync_path(folder.parent)
    except OSError as error:
        raise IOFailure(f"cannot commit {folder}: {error.strerror or error}") from error
    shutil.rmtree(replaced, ignore_errors=True)  # not before: its name tells `clear_unfinished` of a killed commit


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _take_name(folder: Path) -> Path:
    """Rename a checkpoint, if it is there, so that half of one never looks like one; where it is then."""
    doomed = folder.with_name(folder.name + _REMOVED)
    if folder.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
    return doomed


def read(folder: Path) -> Checkpoint:
    """A checkpoint with its manifest, checked for files that lack or have another size; their content is not read."""
    found = _NAME.fullmatch(folder.name)
    step = int(found[1]) if found else -1
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            return Checkpoint(folder, step, {}, f"it has format {manifest['format']}, this version reads {_FORMAT}")
        if manifest.pop("sha256") != _digest(manifest):
            return Checkpoint(folder, step, {}, f"{MANIFEST} is damaged: its sha256 is not its own")
        files, saved_after = manifest["files"], int(manifest["step"])
        if found and saved_after != step:
            return Checkpoint(folder, step, {}, f"its folder was renamed: {MANIFEST} says step {saved_after}")
        step = saved_after
    except FileNotFoundError:
        return Checkpoint(folder, step, {}, f"it has no {MANIFEST}")
    except OSError as error:
        return Checkpoint(folder, step, {}, f"{MANIFEST} cannot be read: {error.strerror or error}", uncertain=True)
    except (ValueError, KeyError, TypeError) as error:
        return Checkpoint(folder, step, {}, f"{MANIFEST} cannot be read: {error!r}")
    for name, record in files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror or error}"
            return Checkpoint(folder, step, manifest, problem, uncertain=True)
        if size != record["size"]:
            found_size = "is missing" if size is None else f"has {size} bytes instead of {record['size']}"
            return Checkpoint(folder, step, manifest, f"{name} {found_size}")
    return Checkpoint(folder, step, manifest, "")


def verify(checkpoint: Checkpoint, files: Iterable[str] | None = None) -> str:
    """Read files and hash them: what is wrong, or an empty string.

    Args:
        files: of the manifest. None: all.
    """
    if checkpoint.problem:
        return checkpoint.problem
    recorded = checkpoint.manifest["files"]
    for name in recorded if files is None else files:
        digest = hashlib.sha256()
        try:
            shown = Progress(f"reading {name}", recorded[name]["size"], "MB", 10**6)
            with (checkpoint.path / name).open("rb") as stream, shown:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                    shown.advance(len(block))
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if digest.hexdigest() != recorded[name]["sha256"]:
            return f"{name} is damaged: its sha256 is not that of {MANIFEST}"
    return ""


def checkpoints(run_dir: RunDir) -> list[Checkpoint]:
    """Every checkpoint of a run, the newest first, with those that do not count; staged ones are none."""
    folders = run_dir.checkpoints.glob("step-*")
    named = [folder for folder in folders if folder.is_dir() and _NAME.fullmatch(folder.name)]
    return sorted(map(read, named), key=lambda checkpoint: -checkpoint.step)


def leftovers(run_dir: RunDir) -> list[Path]:
    """Folders beside the checkpoints that are none: of killed saves and removals, and those that were set aside."""
    folders = run_dir.checkpoints.glob("step-*")
    return sorted(folder for folder in folders if folder.suffix.startswith((_STAGED, _REMOVED, SUPERSEDED)))


def clear_unfinished(run_dir: RunDir) -> None:
    """Remove what killed saves and removals have left; whoever calls it holds the lock of output_dir.

    A save that was killed after it had removed an earlier checkpoint of the same step is whole: it gets its name. Where
    that cannot be told, all of it waits for the next time.
    """
    for folder in leftovers(run_dir):
        final = folder.with_suffix("")
        replaced = final.with_name(final.name + _REMOVED).exists() and not final.exists()
        if folder.suffix == _STAGED and replaced:
            save = read(folder)
            if save.uncertain:
                return
            if not save.problem:
                os.rename(folder, final)
    for folder in leftovers(run_dir):
        if not folder.suffix.startswith(SUPERSEDED):
            shutil.rmtree(folder, ignore_errors=True)


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json of a checkpoint says. Raises CheckpointError."""
    path = folder / RUN_FILE
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def resume_candidates(config: RunConfig) -> list[Checkpoint]:
    """What a run could go on from, the best first: the newest of its output_dir, or what its config names.

    A checkpoint that is named counts until the run that went on from it has saved one itself: so the same command goes
    on after a kill. What run.json says counts only with the hash that the manifest has for it.
    """
    own = checkpoints(RunDir(Path(config.output_dir)))
    if not config.resume_from_checkpoint:
        return own
    named = Path(config.resume_from_checkpoint)
    sound = [checkpoint for checkpoint in own if not verify(checkpoint, [RUN_FILE])]
    went_on = [checkpoint for checkpoint in sound if read_run(checkpoint.path)["resumed_from"] == str(named.resolve())]
    return [*went_on, read(named)]


def supersede_later(run_dir: RunDir, kept: Checkpoint) -> None:
    """Rename checkpoints later than the one that a run goes back to: they would be taken next time, or be damaged."""
    for checkpoint in checkpoints(run_dir):
        if checkpoint.step > kept.step and checkpoint.path.resolve() != kept.path.resolve():
            names = (
                f"{checkpoint.path.name}{SUPERSEDED}{'-' * (n > 1)}{n if n > 1 else ''}" for n in itertools.count(1)
            )
            os.rename(checkpoint.path, next(p for p in map(checkpoint.path.with_name, names) if not p.exists()))


def none_usable(config: RunConfig, faults: list[str]) -> CheckpointError:
    """The error that says why none of the candidates can be used."""
    named = config.resume_from_checkpoint
    where = "resume_from_checkpoint" if named else f"every checkpoint in {RunDir(Path(config.output_dir)).checkpoints}"
    remedy = "Name another one" if named else "Restore one of them, name one in resume_from_checkpoint, or add --fresh"
    return CheckpointError(f"{where} cannot be used: {'; '.join(faults)}. {remedy}")


def retain(run_dir: RunDir, limit: int | None, every_forever: int | None) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit` sound ones, and unsound ones older than the newest sound one.

    One that the file system could not read neither counts as sound nor is removed.

    Args:
        limit: how many sound ones stay, at least 1; None: all.
        every_forever: checkpoints after a multiple of so many steps stay as well.

    Returns:
        What was removed.
    """
    if limit is None:
        return []
    sound, removed = 0, []
    for checkpoint in checkpoints(run_dir):
        keep = every_forever is not None and checkpoint.step % every_forever == 0 and not checkpoint.problem
        if not checkpoint.problem:
            sound += 1
            keep = keep or sound <= limit
        elif sound == 0 or checkpoint.uncertain:
            keep = True
        if not keep:
            shutil.rmtree(_take_name(checkpoint.path), ignore_errors=True)
            removed.append(checkpoint.path)
    return removed
