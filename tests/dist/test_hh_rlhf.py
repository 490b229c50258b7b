"""Real hh-rlhf dialogues all the way: prepared with every refusal counted, trained with full ZeRO-3 on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from transformers import AutoTokenizer

from dsdpo.data.loader import BatchLoader
from dsdpo.data.shards import DROPPED_ROWS, PreparedSet
from dsdpo.runtime.env import Mesh
from tests.dist.test_whole_runs import ROOT, metrics_of, run_forked
from tests.helpers.real import shared_file, smollm2
from tests.helpers.tiny import save_model, tiny_llama_config

ROWS = 2312


def test_prepare_and_train_hh_harmless(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.save_pretrained(tmp_path / "model")
    small = tiny_llama_config(
        tied=True, vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.02
    )
    save_model(tmp_path / "model", small)
    data = shutil.copy(shared_file("hh_harmless_base_test.jsonl.gz"), tmp_path)
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "finetuning_type": "full",
        "dataset": Path(data).name,
        "dataset_dir": str(tmp_path),
        "max_length": 1024,
        "train_batch_size": 16,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    code, output = run_forked(tmp_path)
    assert code == 0, output

    prepared = next(tmp_path.glob(".dsdpo_cache/prepared/*/manifest.json"))
    told = json.loads(prepared.read_text())
    refused = [json.loads(line) for line in (prepared.parent / DROPPED_ROWS).read_text().splitlines()]
    assert told["rows"] == ROWS
    assert told["examples"] + sum(told["refused"].values()) == ROWS and len(refused) == sum(told["refused"].values())
    assert 0 < len(refused) <= 0.01 * ROWS
    assert all(row["source"].startswith("hh_harmless_base_test.jsonl.gz:") and row["reason"] for row in refused)

    losses = [step["loss"] for step in metrics_of(tmp_path / "out")[0]]
    assert len(losses) == 10 and np.isfinite(losses).all()
    assert abs(losses[0] - np.log(2)) < 1e-5 and max(abs(loss - np.log(2)) for loss in losses[1:]) > 1e-3

    dealt = BatchLoader(PreparedSet(prepared.parent), Mesh(0, 8, 0), max_tokens_per_row=4096, share_prefix=True)
    batches = list(dealt.training_batches(range(told["examples"] // 64), train_batch_size=64, seed=42))
    idle = np.average([b.packing.idle_share for b in batches], weights=[b.packing.physical_tokens for b in batches])
    assert idle < 0.03, "8 ranks wait for each other"
