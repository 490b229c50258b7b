"""A stage that begins from the merged adapter of the stage before."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.faults.place import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("stages"))


@pytest.mark.parametrize("launched", [True, False])
def test_the_new_adapter_belongs_to_the_merged_model(place: Place, launched: bool) -> None:
    """Under dsdpo's own launcher, and as ranks of another."""
    run = place.run if launched else place.run_ranks
    before, after = f"sft-{launched}", f"dpo-{launched}"
    short = ["--max_steps", "3", "--finetuning_type", "lora"]
    code, said = run(before, "--stage", "sft", "--dataset", "sft.jsonl", *short)
    assert code == 0, said
    source = place.folder / before
    code, said = run(after, "--model_name_or_path", str(source), "--create_new_adapter", "true", *short)
    assert code == 0, said
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    whole = PeftModel.from_pretrained(base, str(source / "final")).merge_and_unload()
    [folder] = source.glob("merged-*")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    for (name, expected), found in zip(whole.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    settings = json.loads((place.folder / after / "final" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder.resolve())
    first = json.loads((place.folder / after / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # the merged model is the reference, too
