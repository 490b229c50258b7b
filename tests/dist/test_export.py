"""What comes out is ordinary: plain transformers and PEFT load it and compute what the trained engine computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsdpo.export import assemble
from dsdpo.export.huggingface import export
from tests.dist.grid import STEPS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

IDS = [5, 9, 33, 70, 12, 8, 51]
CASES = [
    (model, finetuning, stage) for model in ("tied", "untied") for finetuning in ("full", "lora") for stage in (0, 2, 3)
]

CONTINUED = [(2, "live"), (3, "cached")]  # runs that train the adapter of ("tied", "lora", 0) further


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Path, np.ndarray]]:
    """case -> (output_dir, the trained engine's logits for IDS), from 2 ranks."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("tied", "untied"):
        save_model(folder / name, tiny_llama_config(name == "tied"))
        save_tokenizer(folder / name)
    settings = [
        {"model": str(folder / model), "finetuning_type": f, "stage": stage, "learning_rate": 0.02}
        for model, f, stage in CASES
    ]
    outputs = [folder / "-".join(map(str, case)) for case in CASES]
    for output in outputs:
        output.mkdir()
    logits = run_ranks("tests.dist.grid:train_and_export", 2, settings, [str(o) for o in outputs], IDS)[0]
    found = {case: (output / "out", numbers) for case, output, numbers in zip(CASES, outputs, logits)}

    start = found["tied", "lora", 0][0] / "final"
    further = [
        {**settings[CASES.index(("tied", "lora", stage))], "adapter_name_or_path": str(start), "reference": kind}
        for stage, kind in CONTINUED
    ]
    outputs = [folder / f"continued-{stage}" for stage, _ in CONTINUED]
    for output in outputs:
        output.mkdir()
    logits = run_ranks("tests.dist.grid:train_and_export", 2, further, [str(o) for o in outputs], IDS)[0]
    return found | {stage: (output / "out", numbers) for (stage, _), output, numbers in zip(CONTINUED, outputs, logits)}


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def load(folder: Path) -> Any:
    if (folder / "adapter_config.json").exists():
        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_loading_gives_the_engines_logits(exported: Any, case: Any) -> None:
    output_dir, expected = exported[case]
    base = AutoModelForCausalLM.from_pretrained(output_dir.parents[1] / case[0], dtype=torch.float32)
    assert np.abs(logits_of(base) - expected).max() > 0.05, "training must have moved the model to prove anything"
    np.testing.assert_allclose(logits_of(load(output_dir / "final")), expected, atol=1e-4)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    files = folder.glob("*.safetensors")
    return {key: value for file in files for key, value in safetensors.numpy.load_file(file).items()}


@pytest.mark.parametrize("case", [*CASES, *(stage for stage, _ in CONTINUED)], ids=str)
def test_a_checkpoint_gives_the_same_folder_as_the_engine(
    exported: Any, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one process, tensor by tensor, in several files."""
    output_dir, expected = exported[case]
    monkeypatch.setattr(assemble, "SHARD_BYTES", 20_000)
    export(output_dir, tmp_path / "to", merge=False, step=STEPS)
    found, final = tensors(tmp_path / "to"), tensors(output_dir / "final")
    assert found.keys() == final.keys() and all(np.array_equal(found[key], final[key]) for key in final)
    assert {path.name for path in (output_dir / "final").iterdir()} - {"README.md", "model.safetensors"} <= {
        path.name for path in (tmp_path / "to").iterdir()
    }
    assert "fingerprint" in (tmp_path / "to" / "README.md").read_text()
    np.testing.assert_allclose(logits_of(load(tmp_path / "to")), expected, atol=1e-4)


@pytest.mark.parametrize("stage", [stage for stage, _ in CONTINUED])
def test_a_continued_adapter_is_exported_without_its_reference(exported: Any, stage: int) -> None:
    output_dir, expected = exported[stage]
    start = logits_of(load(exported["tied", "lora", 0][0] / "final"))
    assert np.abs(start - expected).max() > 0.05, "training must have moved the adapter to prove anything"
    np.testing.assert_allclose(logits_of(load(output_dir / "final")), expected, atol=1e-4)
    assert not [path for path in (output_dir / "final").iterdir() if path.is_dir()]


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "lora"], ids=str)
def test_a_merged_adapter_is_a_whole_model_with_the_same_logits(exported: Any, case: Any, tmp_path: Path) -> None:
    output_dir, expected = exported[case]
    export(output_dir, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logits_of(merged), expected, atol=1e-4)
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_complete(exported: Any, case: Any) -> None:
    """Safetensors without empty tensors, a tied weight once, the tokenizer beside them."""
    model, finetuning, _ = case
    final = exported[case][0] / "final"
    names = {}
    for file in final.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})  # noqa: SIM118
    assert names and all(np.prod(shape) > 0 for shape in names.values())
    if finetuning == "full":
        config = AutoModelForCausalLM.from_pretrained(final).config
        assert config.tie_word_embeddings is (model == "tied")
        assert ("lm_head.weight" in names) is (model == "untied")
    else:
        assert all("lora_" in name for name in names)
        base = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(base).is_absolute()
    assert AutoTokenizer.from_pretrained(final).eos_token == "</s>"
    assert not list(final.parent.glob(".*.tmp"))
