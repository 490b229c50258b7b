"""What `dsdpo eval OUTPUT_DIR` makes of a run: its own config, weights and cache, beside a training that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dsdpo import cli
from dsdpo.config.load import load
from dsdpo.config.rules import check_rules
from dsdpo.config.schema import RunConfig
from dsdpo.launch.task import Task, evaluation
from dsdpo.runtime.lock import RunLock
from dsdpo.runtime.rundir import RunDir
from dsdpo.tools.trained import TrainedRun


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainedRun:
    """A run started in tmp_path, which has ended; commands are typed in `elsewhere`."""
    for folder in ("elsewhere", "models/base", "data", "outputs/sft/final"):
        (tmp_path / folder).mkdir(parents=True)
    options = {"model_name_or_path": "models/base", "dataset": ["d"], "output_dir": "outputs/sft", "max_length": 48}
    config = RunConfig(**options, val_size=0.5, truncation_mode="keep_end", loss_type=["sigmoid", "sft"], beta=0.3)
    run_dir = RunDir(tmp_path / "outputs" / "sft")
    run_dir.run_config.write_text(yaml.safe_dump(config.model_dump()))
    (run_dir.final / "adapter_config.json").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = TrainedRun.find("../outputs/sft")
    assert found is not None
    return found


def task_of(*arguments: str) -> Task:
    """What `dsdpo eval` asks the ranks to do."""
    args, overrides = cli._parser()[0].parse_known_args(["eval", *arguments])
    return evaluation(Task("eval", args.config, overrides, args.model), args.usage_error)


def test_an_evaluation_has_the_run_s_options_and_weights(run: TrainedRun, tmp_path: Path) -> None:
    task = task_of("../outputs/sft", "--beta", "0.5", "--cache_dir=mine")
    assert task.model == "../outputs/sft/final"
    loaded = load(task.path, task.overrides)
    assert loaded.config is not None and not loaded.problems and not check_rules(loaded)
    recorded = RunConfig(**yaml.safe_load(run.run_dir.run_config.read_text())).model_dump()
    changed = {key: value for key, value in loaded.config.model_dump().items() if recorded[key] != value}
    assert changed == {
        "model_name_or_path": str(tmp_path / "models" / "base"),
        "dataset_dir": str(tmp_path / "data"),
        "output_dir": "../outputs/sft/evaluation",
        "beta": 0.5,
        "cache_dir": "mine",
    }


def test_it_finds_the_prepared_data_and_reference_of_the_run(run: TrainedRun, tmp_path: Path) -> None:
    task = task_of("../outputs/sft")
    config = load(task.path, task.overrides).config
    assert config is not None and config.cache_path.resolve() == tmp_path / "outputs" / ".dsdpo_cache"


def test_it_may_run_while_the_run_trains(run: TrainedRun) -> None:
    config = load(*_path_and_overrides(task_of("../outputs/sft"))).config
    assert config is not None
    with RunLock.acquire(run.run_dir, "dsdpo train"), RunLock.acquire(RunDir(Path(config.output_dir)), "dsdpo eval"):
        pass


def _path_and_overrides(task: Task) -> tuple[str, list[str]]:
    return task.path, task.overrides


def test_other_weights_can_be_evaluated_as_the_run_does(run: TrainedRun, tmp_path: Path) -> None:
    assert task_of("../outputs/sft", "--model", "org/model").model == "org/model"
    assert task_of(str(tmp_path / "outputs" / "sft" / "final")).path == str(run.run_dir.run_config.absolute().resolve())


def test_the_old_command_line_stands(run: TrainedRun) -> None:
    task = Task("eval", "run.yaml", ["--beta", "1"], "models/base")
    assert task_of("run.yaml", "--model", "models/base", "--beta", "1") == task
    assert task_of("run.yaml", "--model", "../outputs/sft").model == "../outputs/sft/final"


@pytest.mark.parametrize(("folder", "code"), [("../outputs", 66), ("../nowhere", 64)])
def test_another_folder_is_told(run: TrainedRun, folder: str, code: int) -> None:
    try:
        found = cli.main(["eval", folder])
    except SystemExit as caught:
        found = int(caught.code or 0)
    assert found == code


def test_every_path_of_a_run_config_is_known(run: TrainedRun) -> None:
    """An option that names a file or folder is found from another folder, too."""
    from dsdpo.tools.trained import _PATHS

    named = {key for key in RunConfig.model_fields if key.endswith(("_dir", "_path"))}
    assert named - {"output_dir"} <= {*_PATHS}


def test_a_recorded_config_trains_again(run: TrainedRun) -> None:
    """It names every option; that loses which ones were set, of which some rules complain."""
    loaded = load(run.run_dir.run_config)
    assert not loaded.problems and not check_rules(loaded)
    assert loaded.origins.keys() >= {"beta", "max_length"} and "cpo_alpha" not in loaded.origins


def test_the_name_of_a_deepspeed_config_is_no_path_of_the_run(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "zero3").mkdir()
    for value, moved in (("zero3", None), ("mine.json", str(tmp_path / "mine.json"))):
        (tmp_path / "mine.json").touch()
        recorded = yaml.safe_load(run.run_dir.run_config.read_text())
        run.run_dir.run_config.write_text(yaml.safe_dump({**recorded, "deepspeed": value}))
        found = TrainedRun.find("../outputs/sft")
        assert found is not None and found.moved.get("deepspeed") == moved
