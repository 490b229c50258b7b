"""The model card of exported weights, and their way to the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants

from dsdpo.config.schema import RunConfig
from dsdpo.errors import IOFailure
from dsdpo.export.card import add_pictures, run_facts, write_card
from dsdpo.export.push import problems, push
from dsdpo.runtime.rundir import RunDir
from tests.helpers.huggingface_hub import HuggingFace
from tests.helpers.huggingface_hub import huggingface_hub as served_hub


def config_of(tmp_path: Path, **options: Any) -> RunConfig:
    run = {"model_name_or_path": "org/base", "dataset": ["org/pairs:train@main", "mine.jsonl"], "beta": 0.2}
    return RunConfig(**{**run, "output_dir": str(tmp_path / "out"), **options})


def facts_of(config: RunConfig) -> dict[str, Any]:
    versions = {"dsdpo": "0.1.0", "torch": "2.13"}
    known = {"fingerprints": {"data": "abc123"}, "examples": 40, "versions": versions}
    return {"config": config.model_dump(mode="json") | {"hub": "huggingface"}, **known}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with two steps, an evaluation after each, and an adapter."""
    run_dir = RunDir(tmp_path / "out")
    run_dir.final.mkdir(parents=True)
    (run_dir.final / "adapter_config.json").write_text("{}")
    lines: list[dict[str, float]] = []
    for step in (1, 2):
        lines += [{"step": step, "loss": 0.6 / step}, {"step": step, "eval_loss": 0.5 / step}]
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_card_names_base_data_settings_figures_and_versions(tmp_path: Path, run_dir: RunDir) -> None:
    write_card(run_dir.final, facts_of(config_of(tmp_path, model_revision="v1", run_name="mine")), run_dir)
    card = card_of(run_dir.final)
    found = card.data.to_dict()
    assert (found["base_model"], found["datasets"], found["library_name"]) == ("org/base", ["org/pairs"], "peft")
    assert found["tags"] == ["dsdpo", "dpo", "lora", "sigmoid"] and "license" not in found
    for words in ("# mine", "revision `v1`", "`abc123`", "40 examples", "beta: 0.2", "torch 2.13", "fill it in"):
        assert words in card.text
    assert "| train loss | 0.3 | 2 |" in card.text and "| held-out loss | 0.25 | 2 |" in card.text
    assert str(tmp_path) not in card.content


def test_the_figures_of_a_checkpoint_are_those_of_its_step(tmp_path: Path, run_dir: RunDir) -> None:
    write_card(run_dir.final, facts_of(config_of(tmp_path)), run_dir, step=1)
    text = card_of(run_dir.final).text
    assert "| train loss | 0.6 | 1 |" in text and "| held-out loss | 0.5 | 1 |" in text


def test_a_local_base_gives_its_license_and_no_id(tmp_path: Path, run_dir: RunDir) -> None:
    base = tmp_path / "base-1b"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (run_dir.final / "adapter_config.json").unlink()
    write_card(run_dir.final, facts_of(config_of(tmp_path, model_name_or_path=str(base))), run_dir)
    card = card_of(run_dir.final)
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("apache-2.0", "transformers", None)
    assert "`base-1b`" in card.text and str(tmp_path) not in card.content


def test_curves_come_beside_the_weights_and_into_the_card_once(tmp_path: Path, run_dir: RunDir) -> None:
    write_card(run_dir.final, facts_of(config_of(tmp_path)), run_dir)
    run_dir.loss_plot.write_bytes(b"png")
    for _ in range(2):
        add_pictures(run_dir.final, [run_dir.loss_plot])
    assert (run_dir.final / "loss.png").read_bytes() == b"png"
    assert card_of(run_dir.final).content.count("![loss](loss.png)") == 1


def test_what_is_no_run_has_no_facts(tmp_path: Path, run_dir: RunDir) -> None:
    assert run_facts(run_dir.final) is None
    run_dir.run_config.write_text("seed: 1\n")
    assert run_facts(run_dir.path) == {"config": {"seed": 1}}


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HuggingFace]:
    with served_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def test_the_final_folder_is_pushed_with_its_card(tmp_path: Path, run_dir: RunDir, hub: HuggingFace) -> None:
    config = config_of(tmp_path, push_to_hub=True)
    write_card(run_dir.final, facts_of(config), run_dir)
    assert push(config) == "me/out"
    assert push(config_of(tmp_path, push_to_hub=True, hub_model_id="org/mine", hub_private_repo=True)) == "org/mine"
    for name in ("me/out", "org/mine"):
        files = hub.repositories[f"models/{name}"]["main"]
        assert {path: files[path] for path in ("README.md", "adapter_config.json")} == {
            path: (run_dir.final / path).read_bytes() for path in ("README.md", "adapter_config.json")
        }


def test_a_refused_push_leaves_the_weights_and_says_how_to_go_on(
    tmp_path: Path, run_dir: RunDir, hub: HuggingFace
) -> None:
    hub.refuses = 400
    with pytest.raises(IOFailure) as raised:
        push(config_of(tmp_path, push_to_hub=True, hub_model_id="org/mine"))
    assert raised.value.exit_code == 74
    assert f"hf upload org/mine {run_dir.final}" in str(raised.value)
    assert (run_dir.final / "adapter_config.json").exists()


def test_what_would_refuse_a_push_is_told_before_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def codes(**options: Any) -> list[str]:
        return [problem.code for problem in problems(config_of(tmp_path, **options))]

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert codes() == []
    assert codes(push_to_hub=True, hub_model_id="a/b/c") == ["hub-id", "hub-token", "hub-offline"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_test")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert codes(push_to_hub=True) == []
