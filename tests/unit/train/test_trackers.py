"""Metrics in trackers: what TensorBoard, mlflow and trackio hold afterwards, and what a failure does not end."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from accelerate.state import PartialState

from dsdpo.config.schema import RunConfig
from dsdpo.config.trackers import TRACKERS, installed, named_trackers, problem
from dsdpo.train.metrics import Reporter
from dsdpo.train.trackers import MOST_FAILURES, Trackers


def config_of(tmp_path: Path, report_to: str, **more: Any) -> RunConfig:
    out = str(tmp_path / "out")
    return RunConfig(
        model_name_or_path="m", dataset="d", output_dir=out, report_to=report_to, disable_tqdm=True, **more
    )


def report(config: RunConfig, first_step: int, last_step: int) -> None:
    """Steps after `first_step`, as a run reports them."""
    reporter = Reporter(config, 6, True, first_step)
    reporter.start()
    for step in range(first_step + 1, last_step + 1):
        reporter.step({"step": float(step), "loss": 1 / step, "logical_tokens_per_second": 1.0})
    reporter.evaluation(last_step, {"loss": 0.5})
    reporter.close()


def scalars(folder: Path, key: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    config, threads = config_of(tmp_path, "tensorboard"), torch.get_num_threads()
    state = dict(PartialState._shared_state)  # another test's trainer may have made one
    report(config, 0, 4)
    report(config, 2, 6)  # killed after step 4, resumed from a checkpoint after step 2
    folder = tmp_path / "out" / "tensorboard"
    losses = scalars(folder, "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in losses] == pytest.approx([1 / step for step in range(1, 7)])
    assert scalars(folder, "eval/eval_loss")[-1] == (6, 0.5)
    assert PartialState._shared_state == state and torch.get_num_threads() == threads


def test_a_process_that_takes_no_steps_leaves_the_trackers_alone(tmp_path: Path) -> None:
    Reporter(config_of(tmp_path, "tensorboard"), 6, True, None).close()
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    config = config_of(tmp_path, "mlflow", run_name="mine")
    report(config, 0, 2)
    report(config, 2, 4)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (run.info.run_name, run.data.params["seed"]) == ("mine", "42")
    losses = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in losses] == [(step, 1 / step) for step in range(1, 5)]


def test_trackio_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    trackio = pytest.importorskip("trackio")
    config = config_of(tmp_path, "trackio")
    report(config, 0, 2)
    report(config, 2, 4)
    runs = list(trackio.Api().runs("ours"))
    assert [run.name for run in runs] == ["out"]


class Broken(tracking.GeneralTracker):
    """Fails at the steps in `bad`."""

    name = "tensorboard"
    requires_logging_directory = False
    bad: tuple[int, ...] = ()
    seen: list[int] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        assert step is not None
        if step in self.bad:
            raise ConnectionError("no route to host")
        self.seen.append(step)


@pytest.mark.parametrize(
    ("bad", "seen", "lines"), [((2, 4), [1, 3, 5, 6], 1), ((2, 3, 4), [1], 2)], ids=["now-and-then", "for-good"]
)
def test_a_failure_is_one_warning(
    bad: tuple[int, ...], seen: list[int], lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Broken)
    monkeypatch.setattr(Broken, "bad", bad)
    monkeypatch.setattr(Broken, "seen", [])
    said: list[str] = []
    trackers = Trackers(config_of(tmp_path, "tensorboard"), ["tensorboard"], 0, said.append)
    for step in range(1, 7):
        trackers.log({"loss": 1.0}, step)
    trackers.close()
    assert MOST_FAILURES == 3
    assert (Broken.seen, len(said)) == (seen, lines)
    assert "no route to host" in said[0]


def test_a_tracker_that_cannot_start_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").touch()  # where its folder would be
    report(config_of(tmp_path, "tensorboard"), 0, 3)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3]


def test_every_name_is_a_tracker_of_accelerate_and_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert {*TRACKERS} <= tracking.LOGGER_TYPE_TO_CLASS.keys() & INTEGRATION_TO_CALLBACK.keys()
    mlflow = inspect.signature(tracking.MLflowTracker.__init__).parameters
    assert {"run_id", "run_name"} <= mlflow.keys()


def test_all_stands_for_what_is_installed() -> None:
    assert named_trackers(["all"]) == installed() and "tensorboard" in installed()
    assert problem(["all"]) == problem(["tensorboard"]) == problem([]) == ""
    assert "`all` stands alone" in problem(["all", "tensorboard"])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsdpo.config.trackers.importlib.util.find_spec", lambda name: None)
    assert "pip install" in problem([name]) and name in problem([name])
