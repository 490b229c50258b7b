import os
import stat
from pathlib import Path

import pytest

from dsdpo.errors import IOFailure
from dsdpo.runtime.files import write_atomically


def test_writes_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    write_atomically(target, "one")
    write_atomically(target, b"two")
    assert target.read_text() == "two" and os.listdir(target.parent) == ["file"]


def test_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_refused_write_is_an_io_failure_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(IOFailure, match="taken"):
        write_atomically(tmp_path / "taken" / "file", "x")
