"""Quantized base weights: the same training on any number of ranks, ZeRO stage and layout, exported and evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dsdpo.export.huggingface import export
from dsdpo.tools.chat_model import ChatModel, load_both
from tests.helpers.quantized import KINDS, load_quantized, quantized_layers, save_dequantized
from tests.helpers.ranks import run_as_ranks, run_ranks
from tests.helpers.tiny import save_adapter, save_model, save_pairs, save_tokenizer, tiny_llama_config

PAIRS = 17  # steps of 8, 8 and 1 pairs: in the third, ranks stand idle
WORLDS = (1, 2, 3)
IDS = [5, 9, 33, 70, 12, 8, 51]
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization_bit": 4},
    "fp4, single": {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
    "int8": {"quantization_bit": 8},
}
HPZ = {"zero_hpz_partition_size": 2}


def cases_of(world: int) -> dict[str, dict[str, Any]]:
    """Name, which begins with the kind -> changes to `run_config`."""
    found = {
        f"{kind}, ZeRO {stage}": {**OPTIONS[kind], "stage": stage}
        for kind, stages in (("nf4", (0, 1, 2, 3)), ("int8", (0, 1, 2)), ("fp4, single", (0, 3)))
        for stage in stages
    }
    found["nf4, ZeRO 3, recomputing"] = {**OPTIONS["nf4"], "stage": 3, "gradient_checkpointing": True}
    found["nf4, ZeRO 3, live"] = {**OPTIONS["nf4"], "stage": 3, "reference": "live"}
    found["int8, ZeRO 2, live"] = {**OPTIONS["int8"], "stage": 2, "reference": "live"}
    if world == 2:
        found["nf4, ZeRO 3, hpZ"] = {**OPTIONS["nf4"], "stage": 3, "zero": HPZ}
    return found


def train(folder: Path, world: int, cases: dict[str, dict[str, Any]], model: str = "base") -> dict[str, np.ndarray]:
    """Case -> loss and gradient norm of each step, [steps, 2]."""
    common = {
        "model": str(folder / model),
        "finetuning_type": "lora",
        "learning_rate": 1e-2,
        "max_tokens_per_row": 160,
        "cache_dir": str(folder / f"cache-{world}"),
    }
    ranks = run_ranks("tests.dist.grid:run_cases", world, [{**common, **case} for case in cases.values()], PAIRS)
    return {
        name: np.array([[step["loss"], step["grad_norm"]] for step in result["metrics"]])
        for name, result in zip(cases, ranks[0])
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("quantized")
    save_model(found / "base", tiny_llama_config(tied=False))
    save_tokenizer(found / "base")
    for kind, quantization in KINDS.items():
        save_dequantized(found / "base", found / kind, quantization)
        save_tokenizer(found / kind)
    return found


@pytest.fixture(scope="module")
def yardsticks(folder: Path) -> dict[str, np.ndarray]:
    """Kind -> one rank without ZeRO on a plain model of the dequantized values; `none` on the base itself."""
    plain = {"plain": {"stage": 0}}
    return {kind: train(folder, 1, plain, kind)["plain"] for kind in KINDS} | {"none": train(folder, 1, plain)["plain"]}


@pytest.mark.parametrize("world", WORLDS)
def test_training_is_that_of_the_dequantized_model(folder: Path, yardsticks: Any, world: int) -> None:
    """For every stage and kind, and with a live reference."""
    for name, found in train(folder, world, cases_of(world)).items():
        wanted = yardsticks[next(kind for kind in KINDS if name.startswith(kind))]
        assert np.abs(wanted[:, 0] - yardsticks["none"][:, 0]).max() > 2e-3, "it must differ from the base's"
        np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=f"{name}, {world} ranks")


def test_an_adapter_is_trained_further(folder: Path) -> None:
    """With the adapter as its reference, stored and live."""
    base = save_model(folder / "again", tiny_llama_config(tied=False))
    save_adapter(folder / "adapter", base, folder / "base")
    more = {"adapter_name_or_path": str(folder / "adapter")}
    quantized = {
        f"{stage}, {reference}": {**OPTIONS["nf4"], **more, "stage": stage, "reference": reference}
        for stage, reference in ((0, "live"), (3, "cached"), (3, "live"))
    }
    expected = train(folder, 1, {"plain": {"stage": 0, **more}}, "nf4")["plain"]
    for name, found in train(folder, 2, quantized).items():
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].float().numpy()


def test_an_exported_adapter_on_the_base_quantized_the_same_way(folder: Path, tmp_path: Path) -> None:
    """By transformers, PEFT and bitsandbytes alone; and merged into the base in full."""
    cases = [
        {
            "model": str(folder / "base"),
            "finetuning_type": "lora",
            "learning_rate": 0.02,
            "stage": stage,
            **OPTIONS[kind],
        }
        for kind, stage in (("nf4", 0), ("nf4", 3), ("int8", 2))
    ]
    outputs = [tmp_path / str(number) for number in range(len(cases))]
    for output in outputs:
        output.mkdir()
    engines = run_ranks("tests.dist.grid:train_and_export", 2, cases, [str(output) for output in outputs], IDS)[0]
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    for case, output, expected in zip(cases, outputs, engines):
        final = output / "out" / "final"
        settings = PeftConfig.from_pretrained(final)
        assert settings.base_model_name_or_path == str((folder / "base").resolve())
        full = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        moved = np.abs(logits_of(full) - expected).max()
        eight = BitsAndBytesConfig(load_in_8bit=True)
        quantization = four if case["quantization_bit"] == 4 else eight
        base = AutoModelForCausalLM.from_pretrained(
            settings.base_model_name_or_path, dtype=torch.float32, quantization_config=quantization
        )
        for layer in quantized_layers(base).values():
            layer.support_avx512bf16_for_cpu = False  # else it computes in bf16
        # bitsandbytes rounds the input of an 8-bit layer too
        off = 1e-4 if case["quantization_bit"] == 4 else 0.1 * moved
        np.testing.assert_allclose(logits_of(PeftModel.from_pretrained(base, final)), expected, atol=off)
        on_full = logits_of(PeftModel.from_pretrained(full, final))
        export(output / "out", output / "merged", merge=True)
        merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float32)
        assert not hasattr(merged.config, "quantization_config")
        np.testing.assert_allclose(logits_of(merged), on_full, atol=1e-4)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run from the command line, to its end."""
    (folder / "data").mkdir()
    for name, seed in (("train", 0), ("held_out", 1)):
        save_pairs(folder / "data" / f"{name}.jsonl", 24, seed)
    settings = {
        "model_name_or_path": str(folder / "base"),
        "quantization_bit": 4,
        "dataset": "train.jsonl",
        "eval_dataset": "held_out.jsonl",
        "dataset_dir": str(folder / "data"),
        "template": "none",
        "max_length": 64,
        "max_steps": 4,
        "eval_steps": 2,
        "train_batch_size": 8,
        "learning_rate": 0.02,
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    code, output = run_as_ranks(1, "train", str(folder / "run.yaml"))
    assert code == 0, output
    return folder / "run"


def evaluated(*line: str) -> dict[str, Any]:
    """What `dsdpo eval` prints."""
    code, output = run_as_ranks(1, "eval", *line)
    assert code == 0, output
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith('{"model"')))
    return found


def test_eval_and_chat_answer_with_the_quantized_base(folder: Path, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in reversed(lines) if "eval_loss" in line)
    assert evaluated(str(run))["loss"] == pytest.approx(trained["eval_loss"], abs=2e-6)

    chat = ChatModel.load(str(run))
    assert quantized_layers(chat.model)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "nf4", dtype=torch.float32), run / "final"
    )
    np.testing.assert_allclose(logits_of(chat.model), logits_of(plain), atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_chat_answers_with_a_model_that_is_stored_quantized(folder: Path, tmp_path: Path, kind: str) -> None:
    """As with the values that its weights stand for."""
    load_quantized(folder / "base", KINDS[kind]).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    chat = ChatModel.load(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    np.testing.assert_allclose(logits_of(chat.model), logits_of(plain), atol=1e-4)


def test_chat_compares_over_the_same_base(folder: Path, run: Path, tmp_path: Path) -> None:
    """An adapter of no run, such as the one that a run trains further, stands on the run's quantized base."""
    base = save_model(tmp_path / "again", tiny_llama_config(tied=False))
    save_adapter(tmp_path / "adapter", base, folder / "base")
    save_tokenizer(tmp_path / "adapter")
    adapter, own = load_both(str(run), str(tmp_path / "adapter"))
    assert (
        adapter.model is not own.model and quantized_layers(adapter.model).keys() == quantized_layers(own.model).keys()
    )
    assert not quantized_layers(load_both(str(tmp_path / "adapter"), str(folder / "base"))[1].model)


def test_a_merged_model_is_evaluated_as_it_is(run: Path, tmp_path: Path) -> None:
    """In full: the same log-probs as where nothing is quantized."""
    merged = run.with_name("merged")
    export(run, merged, merge=True)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    found = evaluated(str(run), "--model", str(merged))
    full = evaluated(str(run), "--model", str(merged), "--quantization_bit=", f"--cache_dir={tmp_path}")
    for name in ("logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(full[name], abs=1e-5)
    assert abs(found["logps/chosen"] - evaluated(str(run))["logps/chosen"]) > 1e-3, "quantized weights give others"


def test_the_base_is_evaluated_quantized_however_its_path_is_written(folder: Path, run: Path) -> None:
    """As the reference that the run has: the loss of each pair is then log 2."""
    found = evaluated(str(run), "--model", f"{folder}/run/../base")
    assert found["loss"] == pytest.approx(np.log(2), abs=1e-6) and found["rewards/margins"] == 0


def test_another_quantization_is_another_reference_and_no_resume(folder: Path, run: Path) -> None:
    """The store has a folder for each; an unquantized run keeps the key that it always had."""
    stores = {path.name for path in (folder / ".dsdpo_cache" / "reference").iterdir() if path.name != "weights"}
    assert len(stores) == 1
    changes = ["--quantization_type=fp4", "--max_steps=6", "--change_on_resume=max_steps"]
    code, output = run_as_ranks(1, "train", str(folder / "run.yaml"), *changes)
    assert code == 66 and "quantization_type was nf4, now it is fp4" in output
    code, output = run_as_ranks(1, "reference", str(folder / "run.yaml"), *changes, f"--output_dir={folder / 'other'}")
    assert code == 0, output
    now = {path.name for path in (folder / ".dsdpo_cache" / "reference").iterdir() if path.name != "weights"}
    assert stores < now and len(now) == 2
