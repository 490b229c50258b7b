"""What plain DeepSpeed saved is imported bit for bit, and plain transformers and PEFT load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dsdpo.export.deepspeed_import import import_checkpoint
from tests.dist.stock import STEPS, Case
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

IDS = [5, 9, 33, 70, 12, 8, 51]
CASES = [
    Case("tied", 0),
    Case("tied", 1),
    Case("tied", 2),
    Case("tied", 3),
    Case("untied", 2),
    Case("untied", 3),
    Case("tied", 2, bf16=True),
    Case("untied", 3, bf16=True),
    Case("tied", 2, wrapped=True),
    Case("untied", 3, wrapped=True),
    Case("tied", 0, lora=True),
    Case("tied", 2, lora=True),
    Case("untied", 3, lora=True),
    Case("untied", 2, lora=True, keep_frozen=True),
    Case("tied", 3, lora=True, keep_frozen=True),
]
FULL = [case for case in CASES if not case.lora]
LORA = [case for case in CASES if case.lora]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[Path, dict[str, np.ndarray], np.ndarray]]:
    """case -> (folder imported to, the engine's fp32 masters by name, its logits for IDS), from 2 ranks."""
    folder = tmp_path_factory.mktemp("stock")
    for name in ("tied", "untied"):
        save_model(folder / name, tiny_llama_config(name == "tied"))
        save_tokenizer(folder / name)
    results = run_ranks("tests.dist.stock:train_and_save", 2, str(folder), CASES, IDS)[0]
    found = {}
    for case, (masters, logits) in zip(CASES, results, strict=True):
        target = folder / case.name / "imported"
        import_checkpoint(folder / case.name / "checkpoint-2", target)
        found[case] = (target, masters, logits)
    return found


def logits_of(folder: Path) -> np.ndarray:
    kind: Any = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    with torch.no_grad():
        return kind.from_pretrained(folder, dtype="auto").eval()(torch.tensor([IDS])).logits[0].float().numpy()


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_every_tensor_is_the_engines_master(imported: Any, case: Case) -> None:
    folder, masters, _ = imported[case]
    stored = load_file(folder / "model.safetensors")
    assert sorted(stored) == sorted(masters)
    assert ("lm_head.weight" in stored) is (case.model == "untied")
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    for name, tensor in stored.items():
        assert torch.equal(tensor, torch.from_numpy(masters[name]).to(dtype)), name


@pytest.mark.parametrize("case", LORA, ids=lambda case: case.name)
def test_an_adapter_holds_its_own_tensors_as_peft_names_them(imported: Any, case: Case) -> None:
    folder, masters, _ = imported[case]
    stored = load_file(folder / "adapter_model.safetensors")
    expected = {name.replace(".default.", "."): master for name, master in masters.items()}
    assert sorted(stored) == sorted(expected)
    for name, tensor in stored.items():
        assert torch.equal(tensor, torch.from_numpy(expected[name])), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_loading_gives_the_engines_logits(imported: Any, case: Case) -> None:
    folder, _, expected = imported[case]
    base = logits_of(folder.parents[1] / case.model)
    assert np.abs(base - expected).max() > 0.05, "training must have moved the model to prove anything"
    # of logits between 2 and 4 in bf16: two roundings
    np.testing.assert_allclose(logits_of(folder), expected, atol=1e-5 if not case.bf16 else 2**-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_stood_beside_comes_along(imported: Any, case: Case) -> None:
    folder = imported[case][0]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert not list(folder.parent.glob(".*.tmp"))
    assert not list(folder.rglob("*.pt"))
    if case.lora:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(base) == folder.parents[1] / case.model
    else:
        assert GenerationConfig.from_pretrained(folder).max_new_tokens == 7
        assert json.loads((folder / "config.json").read_text())["dtype"] == ("bfloat16" if case.bf16 else "float32")


def test_the_steps_folder_and_a_tag_name_the_same_checkpoint(imported: Any, tmp_path: Path) -> None:
    folder, _, _ = imported[CASES[3]]
    checkpoint = folder.parent / "checkpoint-2"
    step = f"global_step{STEPS}"
    assert import_checkpoint(checkpoint / step, tmp_path / "step") == checkpoint / step
    assert import_checkpoint(checkpoint, tmp_path / "tag", step) == checkpoint / step
    for target in ("step", "tag"):
        assert (tmp_path / target / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_named_models_config_decides_the_precision(imported: Any, tmp_path: Path) -> None:
    """The Hugging Face Trainer's mixed precision: the engine computes in bf16, the config says float32."""
    folder, masters, _ = imported[Case("tied", 2, bf16=True)]
    import_checkpoint(folder.parent / "checkpoint-2", tmp_path / "out", base=str(folder.parents[1] / "tied"))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, torch.from_numpy(masters[name])), name
