"""Which hub an id is asked of, and at which revision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.config.hubs import ModelSource, environment_problems, hub_of, picked_hub, why_picked
from dsdpo.config.load import load
from dsdpo.config.schema import RunConfig
from dsdpo.model.files import problems

MODELSCOPE, HF, OPENMIND = "USE_MODELSCOPE_HUB", "USE_HF", "USE_OPENMIND_HUB"


@pytest.mark.parametrize(
    ("hub", "environment", "picked", "why"),
    [
        ("auto", {}, "huggingface", "hub: auto"),
        ("auto", {MODELSCOPE: "1"}, "modelscope", "USE_MODELSCOPE_HUB=1"),
        ("auto", {MODELSCOPE: "True"}, "modelscope", "USE_MODELSCOPE_HUB=True"),
        ("auto", {MODELSCOPE: "0", HF: ""}, "huggingface", "hub: auto"),
        ("auto", {HF: "1"}, "huggingface", "USE_HF=1"),
        ("huggingface", {MODELSCOPE: "1"}, "huggingface", "hub: huggingface"),
        ("modelscope", {HF: "1", OPENMIND: "1"}, "modelscope", "hub: modelscope"),
    ],
)
def test_the_option_goes_before_the_environment(hub: str, environment: dict[str, str], picked: str, why: str) -> None:
    assert (picked_hub(hub, environment), why_picked(hub, environment)) == (picked, why)
    assert environment_problems(hub, environment) == []


@pytest.mark.parametrize(
    ("environment", "named"),
    [({MODELSCOPE: "1", HF: "true"}, (MODELSCOPE, HF)), ({OPENMIND: "1"}, (OPENMIND,))],
)
def test_an_environment_that_does_not_tell_is_refused(environment: dict[str, str], named: tuple[str, ...]) -> None:
    [problem] = environment_problems("auto", environment)
    assert problem.code == "hub-environment" and all(name in problem.text for name in named)
    assert environment_problems("huggingface", environment) == []


def test_a_revision_is_of_the_run_s_own_model() -> None:
    config = RunConfig(
        model_name_or_path="org/m", model_revision="v1", hub="modelscope", dataset=["x"], output_dir="out"
    )
    assert config.model_source == ModelSource("org/m", "modelscope", "v1")
    assert config.source_of("org/other") == ModelSource("org/other", "modelscope", None)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model_name_or_path": str(tmp_path), "dataset": ["x"], "output_dir": "out"}
    codes = [problem.code for problem in problems(RunConfig(**settings, model_revision="v1"), frozenset())]
    assert "model-revision" in codes
    codes = [problem.code for problem in problems(RunConfig(**settings), frozenset())]
    assert "model-revision" not in codes
    assert ModelSource(str(tmp_path), "modelscope", "v1").place() == (str(tmp_path), None)


def run_with_adapter(folder: Path, hub: str | None, revision: str | None) -> None:
    (folder / "final").mkdir(parents=True)
    (folder / "run_config.yaml").write_text("" if hub is None else yaml.safe_dump({"hub": hub}))
    settings = {"base_model_name_or_path": "org/m", "revision": revision}
    (folder / "final/adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "named", ["model_name_or_path: run\n", "model_name_or_path: org/m\nadapter_name_or_path: run\n"]
)
@pytest.mark.parametrize(
    ("more", "hub", "revision"),
    [
        ("", "modelscope", "v1"),
        ("hub: auto\n", "modelscope", "v1"),
        ("hub: huggingface\nmodel_revision: v2\n", "huggingface", "v2"),
    ],
)
def test_an_adapter_s_base_keeps_hub_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, more: str, hub: str, revision: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_adapter(tmp_path / "run", "modelscope", "v1")
    (tmp_path / "next.yaml").write_text(f"{named}{more}dataset: a\noutput_dir: out\n")
    config = load(tmp_path / "next.yaml").config
    assert config is not None and config.model_source == ModelSource("org/m", hub, revision)  # type: ignore[arg-type]


def test_another_base_takes_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_adapter(tmp_path / "run", "modelscope", "v1")
    text = "model_name_or_path: org/other\nadapter_name_or_path: run\ndataset: a\noutput_dir: out\n"
    (tmp_path / "next.yaml").write_text(text)
    config = load(tmp_path / "next.yaml").config
    assert config is not None and (config.hub, config.model_revision) == ("auto", None)


def test_the_hub_of_weights_is_that_of_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of an earlier version had one hub alone; of a folder without a run the environment tells."""
    run_with_adapter(tmp_path / "a", "modelscope", None)
    run_with_adapter(tmp_path / "b", "huggingface", None)
    (tmp_path / "earlier/final").mkdir(parents=True)
    (tmp_path / "earlier/run_config.yaml").write_text("seed: 1\n")
    (tmp_path / "alone").mkdir()
    for value, alone in (("0", "huggingface"), ("1", "modelscope")):
        monkeypatch.setenv(MODELSCOPE, value)
        found = [hub_of(tmp_path / folder) for folder in ("a/final", "a", "b/final", "earlier/final", "alone")]
        assert found == ["modelscope", "modelscope", "huggingface", "huggingface", alone]
