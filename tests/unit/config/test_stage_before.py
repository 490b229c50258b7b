"""`model_name_or_path` may be the output_dir of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsdpo.config.load import load
from dsdpo.config.rules import check_rules
from dsdpo.model.files import not_merged


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["run_config.yaml", "final/config.json"], "run/final"),
        (["run_config.yaml", "final/adapter_config.json"], "run/final"),  # the check says how to go on with it
        (["run_config.yaml"], "run"),
        (["config.json", "run_config.yaml", "final/config.json"], "run"),
        (["config.json"], "run"),
        ([], "run"),
    ],
)
def test_a_run_stands_for_its_weights(tmp_path: Path, files: list[str], taken: str) -> None:
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    (tmp_path / "next.yaml").write_text(f"model_name_or_path: {tmp_path / 'run'}\ndataset: a\noutput_dir: out\n")
    config = load(tmp_path / "next.yaml").config
    assert config is not None and config.model_name_or_path == str(tmp_path / taken)


def begun_from(tmp_path: Path, text: str) -> tuple[str, str | None]:
    """Model and adapter of a run config beside the folder `run` of a run with an adapter on `base`: `final` and
    `merged` stand for folders of that run."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (tmp_path / "run" / "run_config.yaml").write_text("")
    (final / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    (tmp_path / "next.yaml").write_text(f"dataset: a\noutput_dir: out\n{text}")
    config = load(tmp_path / "next.yaml").config
    assert config is not None
    model, adapter = config.model_name_or_path, config.adapter_name_or_path
    if Path(model).parent == tmp_path / "run" and Path(model).name.startswith("merged-"):
        model = "merged"
    return model.replace(str(final), "final"), adapter and adapter.replace(str(final), "final")


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ("", ("base", "final")),
        ("adapter_name_or_path: other\n", ("final", "other")),
        ("finetuning_type: full\n", ("final", None)),  # the check says how to merge it
        ("create_new_adapter: true\n", ("merged", None)),
        ("create_new_adapter: true\nfinetuning_type: full\n", ("merged", None)),
    ],
)
def test_its_adapter_is_trained_further(tmp_path: Path, more: str, taken: tuple[str, str | None]) -> None:
    assert begun_from(tmp_path, f"model_name_or_path: {tmp_path / 'run'}\n{more}") == taken


@pytest.mark.parametrize(("more", "taken"), [("", ("base", "final")), ("create_new_adapter: true\n", ("merged", None))])
def test_a_run_may_be_named_as_the_adapter(tmp_path: Path, more: str, taken: tuple[str, str | None]) -> None:
    """As LLaMA-Factory's files name it, beside the base model."""
    text = f"model_name_or_path: base\nadapter_name_or_path: {tmp_path / 'run'}\n{more}"
    assert begun_from(tmp_path, text) == taken


def test_a_run_that_is_trained_further_is_merged_anew(tmp_path: Path) -> None:
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (tmp_path / "run" / "run_config.yaml").write_text("")
    (final / "adapter_config.json").write_text("{}")
    text = f"model_name_or_path: {tmp_path / 'run'}\ncreate_new_adapter: true\ndataset: a\noutput_dir: out\n"
    (tmp_path / "next.yaml").write_text(text)
    names = []
    for content in (b"one", b"two", b"one"):
        (final / "adapter_model.safetensors").write_bytes(content)
        config = load(tmp_path / "next.yaml").config
        assert config is not None and Path(config.model_name_or_path).parent == tmp_path / "run"
        names.append(Path(config.model_name_or_path).name)
    assert names[0] == names[2] != names[1] and all(name.startswith("merged-") for name in names)


@pytest.mark.parametrize("model", ["base", "org/merged-7b", "merged-base", "somewhere/else/merged-1"])
def test_a_model_that_is_no_merged_run_is_no_run_to_merge(tmp_path: Path, model: str) -> None:
    """Whatever it is called."""
    (tmp_path / "next.yaml").write_text(
        f"model_name_or_path: {model}\ncreate_new_adapter: true\ndataset: a\noutput_dir: out\n"
    )
    loaded = load(tmp_path / "next.yaml")
    assert loaded.config is not None and not_merged(loaded.config) is None
    assert [problem.code for problem in check_rules(loaded)] == ["create-new-adapter"]
