"""Curves from metrics.jsonl."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from dsdpo.errors import DataError, IOFailure
from dsdpo.runtime.rundir import RunDir
from dsdpo.tools.plots import plot, read_metrics, smooth


def train_record(step: int) -> dict[str, float]:
    return {
        "step": float(step),
        "loss": 0.7 - 0.01 * step,
        "rewards/chosen": 0.01 * step,
        "rewards/rejected": -0.02 * step,
        "rewards/margins": 0.03 * step,
        "rewards/accuracies": 0.5 + 0.01 * step,
    }


def write(folder: Path, records: list[dict[str, float]], rest: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + rest)


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height in pixels, from the PNG's header."""
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:24])


def test_a_run_gives_three_pictures(tmp_path: Path) -> None:
    held_out = {"step": 20.0, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7, "eval_rewards/margins": 0.3}
    write(tmp_path, [*map(train_record, range(1, 21)), held_out])
    pictures = plot(RunDir(tmp_path))
    assert [picture.name for picture in pictures] == ["loss.png", "rewards.png", "accuracy.png"]
    assert all(size_of(picture) == (1200, 750) for picture in pictures)


def test_held_out_points_are_drawn(tmp_path: Path) -> None:
    write(tmp_path, [train_record(step) for step in range(1, 9)])
    without = plot(RunDir(tmp_path))[0].read_bytes()
    write(tmp_path, [*(train_record(step) for step in range(1, 9)), {"step": 8.0, "eval_loss": 0.65}])
    assert plot(RunDir(tmp_path))[0].read_bytes() != without


def test_a_picture_without_values_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 1.0, "loss": 0.7}])
    assert [picture.name for picture in plot(RunDir(tmp_path))] == ["loss.png"]


def test_a_half_written_last_line_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, [train_record(1), train_record(2)], rest='{"step": 3.0, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_damage_before_the_last_line_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1.0, "loss": 0.7}\n{"lo\n{"step": 3.0, "loss": 0.6}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is no record"):
        plot(RunDir(tmp_path))


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), ("", "no step yet"), ('{"st', "no step yet")])
def test_no_metrics_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=words):
        plot(RunDir(tmp_path))


def test_a_picture_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    write(tmp_path, [train_record(1)])
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(IOFailure, match=r"cannot write .*loss\.png"):
        plot(RunDir(tmp_path))


def test_smoothing_keeps_a_line_where_it_is() -> None:
    line = [float(i) for i in range(30)]
    assert smooth(line, 5)[2:-2] == pytest.approx(line[2:-2])
    assert smooth([3.0], 5) == [3.0]
