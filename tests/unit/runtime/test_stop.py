"""What a rank writes about the end of a run, and what is read of it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, read_exit, reserve_exit, write_exit, write_peer_exit

HANG = ExitRecord(71, "rank 1 is silent", 0)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    run_dir, record = RunDir(tmp_path), ExitRecord(74, "rank 5: a message may begin so", 3)
    write_exit(run_dir, record)
    assert read_exit(run_dir.exit) == record
    assert json.loads(run_dir.exit.read_text()) == {"code": 74, "message": record.message, "rank": 3}
    write_peer_exit(run_dir, record)
    assert read_exit(run_dir.peer_exit) == record


@pytest.mark.parametrize(
    ("content", "record"),
    [
        ('{"code": 75, "message": "stopped"}', ExitRecord(75, "stopped", 0)),
        ('{"code": 74, "message": "rank 12: disk full"}', ExitRecord(74, "disk full", 12)),
        (
            '{"code": 71, "message": "rank 1 (host a) died"}',
            ExitRecord(71, "rank 1 (host a) died", 0),
        ),
    ],
)
def test_a_file_of_an_earlier_version_is_read(tmp_path: Path, content: str, record: ExitRecord) -> None:
    (tmp_path / "file").write_text(content)
    assert read_exit(tmp_path / "file") == record


@pytest.mark.parametrize("content", [None, "", "{", "[]", "7", '{"code": 1}', '{"code": "x", "message": ""}'])
def test_what_is_no_record_counts_as_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "file").write_text(content)
    assert read_exit(tmp_path / "file") is None


def test_the_first_of_several_peers_counts(tmp_path: Path) -> None:
    write_peer_exit(RunDir(tmp_path), HANG)
    with pytest.raises(FileExistsError):
        write_peer_exit(RunDir(tmp_path), ExitRecord(74, "disk full", 2))
    assert read_exit(RunDir(tmp_path).peer_exit) == HANG


@pytest.mark.parametrize(("code", "kept"), [(1, True), (75, False)])
def test_only_a_lost_peer_leaves_a_hang_in_place(tmp_path: Path, code: int, kept: bool) -> None:
    later = ExitRecord(code, "connection reset by peer", 0)
    write_exit(RunDir(tmp_path), HANG)
    write_exit(RunDir(tmp_path), later)
    assert read_exit(RunDir(tmp_path).exit) == (HANG if kept else later)


def test_without_room_the_record_goes_into_the_reserve_with_its_rank(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    reserve_exit(run_dir)
    room, hard = run_dir.exit_reserve.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard[1]))  # a larger file is refused, as by a full disk
    try:
        write_exit(run_dir, ExitRecord(74, "x" * 2 * room, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
    record = read_exit(run_dir.exit)
    assert record is not None and (record.code, record.rank) == (74, 4) and record.message.startswith("xxx")
    assert not run_dir.exit_reserve.exists()
