"""Curves from metrics.jsonl."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsdpo import cli
from dsdpo.errors import DataError, IOFailure
from dsdpo.runtime.rundir import RunDir
from dsdpo.tools import plots
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


def test_the_average_starts_where_the_values_start() -> None:
    falling = [10.0, 4.0, 2.0, 1.0]
    assert smooth(falling, 20)[0] == 10.0
    assert smooth([3.0] * 9, 5) == pytest.approx([3.0] * 9)
    assert smooth(falling, 1) == falling
    decay = 1 - 2 / 4
    biased = 0.0
    for count, value in enumerate(falling, 1):  # Adam's way to the same
        biased = decay * biased + (1 - decay) * value
        assert smooth(falling, 3)[count - 1] == pytest.approx(biased / (1 - decay**count))


def test_the_title_names_run_model_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [train_record(1)])
    options = {"run_name": "mine", "model_name_or_path": "/models/org/base-1b", "dataset": ["pairs", "more"]}
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump(options))
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **look: titles.append(title))
    plot(RunDir(tmp_path))
    assert titles[0].splitlines() == ["Loss", "mine  |  org/base-1b  |  pairs, more"]


def test_runs_are_drawn_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, steps in (("a", 9), ("b", 4), ("c", 6)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [train_record(step) for step in range(1, steps)])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", "a", "b", "c", "--to", "all"]) == 0
    assert capsys.readouterr().out.split() == ["all/loss.png", "all/rewards.png", "all/accuracy.png"]
    assert cli.main(["plot", "a", "b", "--to", "two"]) == 0
    assert Path("all/loss.png").read_bytes() != Path("two/loss.png").read_bytes()
    assert not list(tmp_path.glob("[abc]/*.png"))
    assert cli.main(["plot", "a", "b"]) == 0
    assert Path("comparison/loss.png").read_bytes() == Path("two/loss.png").read_bytes()


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    monkeypatch.setattr(Figure, "legend", lambda *args, **options: None)
    monkeypatch.setattr(plots, "_draw_curve", lambda axes, curve: labels.append(curve.label))
    for folder in ("x/out", "y/out", "y/other"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, [{"step": 1.0, "loss": 0.5}])
    plots.overlay([RunDir(tmp_path / "x/out"), RunDir(tmp_path / "y/out")], tmp_path)
    plots.overlay([RunDir(tmp_path / "x/out"), RunDir(tmp_path / "y/other")], tmp_path)
    assert labels == [str(tmp_path / "x/out"), str(tmp_path / "y/out"), "out", "other"]
