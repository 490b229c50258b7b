"""A run of an earlier version keeps the defaults that it was begun with; one that is begun today has today's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.config import earlier
from dsdpo.config.load import LoadResult, load
from dsdpo.config.schema import RunConfig


def read(folder: Path, *arguments: str, fresh: bool = False, **options: Any) -> LoadResult:
    base = {"model_name_or_path": "m", "dataset": ["d"], "output_dir": str(folder / "out")}
    (folder / "run.yaml").write_text(yaml.safe_dump(base | options))
    loaded = load(folder / "run.yaml", arguments, fresh)
    assert loaded.config is not None and not loaded.problems
    return loaded


def rate(loaded: LoadResult) -> float:
    assert loaded.config is not None
    return loaded.config.learning_rate


def begun(folder: Path, where: str, **options: Any) -> Path:
    """What an earlier version left: run_config.yaml, or run.json of a checkpoint."""
    others = {"truncation_mode": "keep_end", "val_split": "prompt"}  # these tests are about the learning rate alone
    saved = {"finetuning_type": "lora", "learning_rate": 1e-6, **others, **options}
    path = folder / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": saved}) if path.suffix == ".json" else yaml.safe_dump(saved))
    return path


@pytest.mark.parametrize(("kind", "value"), [("full", 1e-6), ("lora", 1e-5)])
def test_a_new_run_takes_the_rate_of_what_it_trains(tmp_path: Path, kind: str, value: float) -> None:
    assert rate(read(tmp_path, finetuning_type=kind)) == value
    assert rate(read(tmp_path, finetuning_type=kind, learning_rate=None)) == value
    assert rate(read(tmp_path, "--learning_rate", "3e-4", finetuning_type=kind)) == 3e-4
    named = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", finetuning_type=kind)
    assert named.learning_rate == value


@pytest.mark.parametrize("where", ["out/run_config.yaml", "out/checkpoints/step-00000002/run.json"])
def test_an_earlier_run_keeps_its_rate(tmp_path: Path, where: str) -> None:
    begun(tmp_path, where)
    loaded = read(tmp_path)
    assert rate(loaded) == 1e-6 and "learning_rate 1e-06" in loaded.remark
    assert rate(read(tmp_path, learning_rate=5e-5)) == 5e-5
    assert rate(read(tmp_path, "--learning_rate", "5e-5")) == 5e-5
    assert rate(read(tmp_path, fresh=True)) == 1e-5 and not read(tmp_path, fresh=True).remark
    assert rate(read(tmp_path, output_dir=str(tmp_path / "another"))) == 1e-5


def test_a_checkpoint_that_is_named_counts(tmp_path: Path) -> None:
    named = begun(tmp_path, "before/checkpoints/step-00000002/run.json").parent
    for fresh in (False, True):
        assert rate(read(tmp_path, fresh=fresh, resume_from_checkpoint=str(named))) == 1e-6
    begun(tmp_path, "out/checkpoints/step-00000004/run.json", learning_rate=1e-5)
    assert rate(read(tmp_path, resume_from_checkpoint=str(named))) == 1e-5, "the run that went on has one itself"


def test_a_run_of_today_has_nothing_to_keep(tmp_path: Path) -> None:
    begun(tmp_path, "out/run_config.yaml", learning_rate=1e-5)
    assert rate(read(tmp_path)) == 1e-5 and not read(tmp_path).remark


def test_full_training_has_the_rate_that_it_had(tmp_path: Path) -> None:
    begun(tmp_path, "out/run_config.yaml", finetuning_type="full")
    assert rate(read(tmp_path, finetuning_type="full")) == 1e-6 and not read(tmp_path, finetuning_type="full").remark


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0", "config: 3"])
def test_a_damaged_description_is_passed_over(tmp_path: Path, content: str) -> None:
    begun(tmp_path, "out/checkpoints/step-00000002/run.json")
    newer = begun(tmp_path, "out/checkpoints/step-00000004/run.json")
    newer.write_text(content)
    assert rate(read(tmp_path)) == 1e-6
    (tmp_path / "out/checkpoints/step-00000002/run.json").write_text(content)
    assert rate(read(tmp_path)) == 1e-5


def test_an_option_that_the_run_did_not_know_had_the_earlier_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of options that this version does not have are skipped."""
    monkeypatch.setitem(earlier.EARLIER_DEFAULTS, "logging_steps", 7)
    monkeypatch.setitem(earlier.EARLIER_DEFAULTS, "no_such_option", 1)
    begun(tmp_path, "out/run_config.yaml")
    loaded = read(tmp_path)
    assert loaded.config is not None and loaded.config.logging_steps == 7
    assert "logging_steps 7" in loaded.remark and "no_such_option" not in loaded.remark


def test_each_entry_differs_from_today_and_is_allowed() -> None:
    base = {"model_name_or_path": "m", "dataset": ["d"], "output_dir": "o"}
    for option, value in earlier.EARLIER_DEFAULTS.items():
        if option in RunConfig.model_fields:
            assert getattr(RunConfig(**base), option) != value
            assert getattr(RunConfig(**base, **{option: value}), option) == value
