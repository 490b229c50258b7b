"""`dsdpo files`: what comes with dsdpo beside its code, written where it can be read, changed and submitted."""

from __future__ import annotations

from pathlib import Path

from dsdpo.errors import CommandLineError, IOFailure, Problem
from dsdpo.runtime.shipped import root, shipped_files

_SCRIPT = b"#!"


def write_files(target: Path) -> tuple[list[Path], list[Path]]:
    """Write the shipped files below a folder, which is made if missing.

    Returns:
        Relative paths of the files that were written, and of those that were there with the same content.

    Raises:
        CommandLineError: there are others of the same names; nothing was written.
        IOFailure: the file system refused.
    """
    top = root()
    files = shipped_files(top)
    try:
        states = {file: _state(top / file, target / file) for file in files}
        if problems := [_differs(target / file) for file, state in states.items() if state == "other"]:
            raise CommandLineError(problems)
        written = [file for file, state in states.items() if state == "missing"]
        for file in written:
            _write(top / file, target / file)
    except OSError as error:
        where = error.filename or target
        raise IOFailure(f"cannot write {where}: {error.strerror or error}; choose another folder for --to") from error
    return written, [file for file in files if states[file] == "same"]


def _state(ours: Path, theirs: Path) -> str:
    """Whether the target is `missing`, the `same` or an `other` one. Raises OSError."""
    if not theirs.exists() and not theirs.is_symlink():
        return "missing"
    return "same" if theirs.is_file() and theirs.read_bytes() == ours.read_bytes() else "other"


def _differs(path: Path) -> Problem:
    text = f"--to: {path} is there, and differs from the file that comes with dsdpo; move it, or choose another folder"
    return Problem("file-exists", "--to", text)


def _write(source: Path, target: Path) -> None:
    """A script can be executed by whoever can read it, whatever an installer has made of its mode."""
    content = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    if content.startswith(_SCRIPT):
        mode = target.stat().st_mode
        target.chmod(mode | (mode & 0o444) >> 2)
