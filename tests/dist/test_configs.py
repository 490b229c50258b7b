"""The configs of configs/ run as they are, on tiny models of the same families and our samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from tests.helpers.ranks import run_as_ranks
from tests.helpers.real import ROOT
from tests.helpers.tiny import save_model
from tests.unit.data.conftest import make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=4096)
QWEN = Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=4096)
GPT2 = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=1024)
STAGES = ("pt", "sft", "rm", "dpo")


def save(folder: Path, config: PreTrainedConfig, family: str, chat_template: str | None = None) -> str:
    save_model(folder, config)
    make_tokenizer(family, chat_template).save_pretrained(folder)
    return str(folder)


def run(config: str, model: str, out: Path, *more: str) -> None:
    line = ["train", str(ROOT / "configs" / config), "--model_name_or_path", model, "--output_dir", str(out)]
    small = ["--max_steps", "2", "--train_batch_size", "4", "--dataset_dir", str(ROOT / "data"), "--plot_loss", "false"]
    code, said = run_as_ranks(1, *line, *small, "--max_refused", "0.5", *more)
    assert code == 0, f"{config}:\n{said}"
    assert (out / "COMPLETED").exists() and (out / "final" / "tokenizer.json").exists()


def test_the_stages_of_llama_2_one_after_another(tmp_path: Path) -> None:
    """The adapter of sft is merged for rm, and trained further by dpo."""
    before = save(tmp_path / "llama", LLAMA, "llama")
    for stage in STAGES:
        run(f"llama2-7b/{stage}.yaml", before, tmp_path / stage, "--deepspeed", "{}")
        if stage in ("pt", "sft"):
            before = str(tmp_path / stage)
    adapter = json.loads((tmp_path / "rm/final/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] in [str(path.resolve()) for path in (tmp_path / "sft").glob("merged-*")]
    adapter = json.loads((tmp_path / "dpo/final/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str((tmp_path / "pt" / "final").resolve())


@pytest.mark.parametrize("config", ["qwen2-0.5b-cvalues.yaml", "kto.yaml"])
def test_those_of_qwen2(tmp_path: Path, config: str) -> None:
    run(config, save(tmp_path / "qwen", QWEN, "chatml", CHATML), tmp_path / "out")


def test_that_of_gpt_2(tmp_path: Path) -> None:
    run("gpt2-text-to-sql.yaml", save(tmp_path / "gpt2", GPT2, "gpt2"), tmp_path / "out", "--max_samples", "8")
