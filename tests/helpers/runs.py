"""A folder from which `dsdpo train run.yaml` trains a tiny model."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config


def save_run(folder: Path, **settings: object) -> Path:
    """Write model, tokenizer, 40 pairs and run.yaml with `settings` into `folder`. Returns it."""
    save_model(folder / "model", tiny_llama_config())
    save_tokenizer(folder / "model")
    save_pairs(folder / "pairs.jsonl", 40)
    data = {"dataset": "pairs.jsonl", "dataset_dir": str(folder), "cache_dir": str(folder / "cache"), "max_length": 64}
    config = {"model_name_or_path": str(folder / "model"), **data, "train_batch_size": 8, "learning_rate": 0.01}
    (folder / "run.yaml").write_text(yaml.safe_dump(config | settings))
    return folder
