"""Writing files so that a reader sees all of one or nothing, also after a crash; hashing files once."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from dsdpo.errors import IOFailure
from dsdpo.runtime.progress import Progress

_HASH_BLOCK = 1 << 24
_SETTLED_NS = 2_000_000_000  # a file changed less than this ago could change again within the clock's grain

LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git has not fetched
LFS_TEXT = "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write to a temporary neighbour, fsync, rename over `path`, fsync the folder; the folder is made if missing.

    Raises:
        IOFailure: the file system refused; `path` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)
    except OSError as error:
        raise IOFailure(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


def fsync_tree(folder: Path) -> None:
    """Make all that is in a folder survive a power cut, whoever wrote it. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)


def follow_umask(folder: Path) -> None:
    """Give all files in a folder the mode of a new file: safetensors writes a file for its owner alone. OSError."""
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_state(path: Path) -> dict[str, Any]:
    """Size, inode and times of change of a file: what differs once its content does. Raises OSError."""
    status = path.stat()
    return {
        "path": str(path),
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def is_settled(state: dict[str, Any]) -> bool:
    """Whether a file of this `file_state` cannot change any more without a change of the state."""
    return time.time_ns() - max(int(state["mtime_ns"]), int(state["ctime_ns"])) > _SETTLED_NS


def file_digest(path: Path, stamps: Path | None) -> str:
    """sha256 of a file's content, remembered for the same file in the same state.

    Args:
        path: the file; a link is followed.
        stamps: folder that remembers hashes. The state is size, inode and both times of change: writing over a file,
            or putting another in its place with an old date, changes one of them. None: nothing is remembered.
    """
    state = file_state(path)
    stamp = stamps and stamps / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    if stamp and stamp.exists():
        known = json.loads(stamp.read_bytes())
        if all(known.get(key) == value for key, value in state.items()):
            return str(known["sha256"])
    digest = hashlib.sha256()
    with path.open("rb") as stream, Progress(f"reading {path.name}", state["size"], "MB", 10**6) as progress:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
            progress.advance(len(block))
    if stamp and is_settled(state):
        write_atomically(stamp, json.dumps({**state, "sha256": digest.hexdigest()}))
    return digest.hexdigest()
