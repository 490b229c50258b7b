"""Writing files so that a reader sees all of one or nothing, also after a crash."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from dsdpo.errors import IOFailure


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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise IOFailure(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
