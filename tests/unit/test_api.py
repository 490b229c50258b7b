"""`import dsdpo`: what its functions take, give and raise."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import dsdpo
from dsdpo import errors
from dsdpo.api import TrainResult, _environment_kept, _text
from dsdpo.config.load import load
from dsdpo.config.schema import RunConfig
from dsdpo.launch.deepspeed import StopRequests
from dsdpo.launch.supervisor import error_from
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import ExitRecord, write_exit
from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config

# Texts that YAML would take for something else, and values of every kind.
ODD: dict[str, Any] = {
    "model_name_or_path": "null",
    "dataset": ["a,b", "on", "ü {x}: 'y' \"z\" 😀"],
    "output_dir": "1_000",
    "default_system": "",
    "run_name": "~",
    "learning_rate": 1e-5,
    "train_batch_size": 16,
    "save_steps": None,
    "share_prefix": False,
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.5],
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "template": "{% for m in messages %}\n{{ m.content }}{% endfor %}",
}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "model", tiny_llama_config())
    save_tokenizer(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    return {
        "model_name_or_path": tmp_path / "model",
        "dataset": "pairs.jsonl",
        "dataset_dir": str(tmp_path),
        "output_dir": tmp_path / "out",
        "max_length": 64,
    }


def test_a_mapping_says_what_it_says() -> None:
    """To the value, as RunConfig takes it."""
    loaded = load(_text(ODD))
    assert not loaded.problems and loaded.config == RunConfig(**ODD)
    assert loaded.where("beta") == "default" and loaded.where("run_name") == "run config"
    again = load(_text(RunConfig(**ODD)))
    assert again.config == RunConfig(**ODD) and set(again.origins) == set(ODD)


def test_options_can_be_added_to_a_config_that_is_given_as_text() -> None:
    loaded = load(_text(ODD), ["--beta", "0.3"])
    assert loaded.config is not None and loaded.config.beta == 0.3 and loaded.config.run_name == "~"


@pytest.mark.parametrize("kind", ["dict", "RunConfig", "path", "text"])
def test_a_config_may_be_given_in_four_ways(settings: dict[str, Any], tmp_path: Path, kind: str) -> None:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    given = {"dict": settings, "path": tmp_path / "run.yaml", "text": str(tmp_path / "run.yaml")}
    config = dsdpo.load_config(RunConfig(**plain) if kind == "RunConfig" else given[kind])
    assert config == RunConfig(**plain)


def test_mistakes_are_raised_together_with_their_codes(settings: dict[str, Any]) -> None:
    for function in (dsdpo.load_config, dsdpo.prepare, dsdpo.train):
        with pytest.raises(errors.ConfigError) as caught:
            function({**settings, "beta": -1, "sede": 1, "deepspeed": "zero4"})
        codes = [(problem.code, problem.option) for problem in caught.value.problems]
        assert codes == [("unknown-option", "sede"), ("value", "beta"), ("deepspeed-name", "deepspeed")]
        assert caught.value.exit_code == 64
    assert not Path(settings["output_dir"]).exists()


def test_a_value_that_is_none_of_yaml_is_told() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        dsdpo.load_config({"beta": object()})
    assert [problem.code for problem in caught.value.problems] == ["value"]


def test_another_trainers_options_are_translated(settings: dict[str, Any]) -> None:
    config = dsdpo.load_config({**settings, "num_beams": None, "lora_r": 4, "per_device_train_batch_size": 2})
    assert config.lora_rank == 4


def test_prepare_makes_the_prepared_data(settings: dict[str, Any]) -> None:
    dsdpo.prepare(settings)
    assert list(Path(settings["output_dir"]).parent.glob(".dsdpo_cache/prepared/*/manifest.json"))


def test_a_rank_starts_no_ranks(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(errors.ConfigError) as caught:
        dsdpo.train(settings)
    assert [problem.code for problem in caught.value.problems] == ["launched"]


def test_the_environment_is_what_it_was() -> None:
    before = dict(os.environ)
    with pytest.raises(KeyError), _environment_kept():
        os.environ["DS_ACCELERATOR"] = "other"
        os.environ["NEW_OF_A_TEST"] = "1"
        del os.environ["PATH"]
        raise KeyError
    assert dict(os.environ) == before


@pytest.mark.parametrize("kind", errors.DsdpoError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_an_exit_code_of_the_ranks_is_raised_as_its_class(tmp_path: Path, kind: type[errors.DsdpoError]) -> None:
    write_exit(RunDir(tmp_path), ExitRecord(kind.exit_code, "what happened", 0))
    error = error_from("train", RunDir(tmp_path), kind.exit_code)
    assert type(error) is kind and "what happened" in str(error)


def test_an_exit_code_without_a_record_is_an_error_too(tmp_path: Path) -> None:
    assert type(error_from("train", RunDir(tmp_path), 70)) is errors.NumericError
    assert type(error_from("train", RunDir(tmp_path), 1)) is errors.DsdpoError


def test_another_thread_can_train_without_signals(tmp_path: Path) -> None:
    failed = []

    def enter() -> None:
        try:
            with StopRequests(RunDir(tmp_path)):
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed


def test_a_result_has_the_files_of_the_run(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 0.7}, {"step": 1, "eval_loss": 0.6}]
    RunDir(tmp_path).metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = TrainResult(tmp_path)
    assert result.final == tmp_path / "final" and result.metrics == records
