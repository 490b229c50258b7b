"""The settings of a case, for both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.cases import Case

_BETA = 0.1


def run_config(case: Case, folder: Path) -> dict[str, Any]:
    """dsdpo's run config of a case."""
    settings: dict[str, Any] = {
        "model_name_or_path": str(case.model),
        "finetuning_type": "full" if case.finetuning == "full" else "lora",
        "dataset": case.pairs.dataset,
        "dataset_dir": str(case.pairs.folder.resolve()),
        "max_length": case.pairs.max_length,
        **dict(case.pairs.options),
        "cache_dir": str(folder / "cache"),
        "beta": _BETA,
        "reference": case.reference,
        "train_batch_size": case.batch,
        "max_steps": case.steps,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": case.seed,
        "output_dir": str(folder / "dsdpo"),
        "disable_tqdm": True,
    }
    if case.gradient_checkpointing:  # else the default, which recomputes where memory asks for it
        settings["gradient_checkpointing"] = "full"
    if case.finetuning != "full":
        settings["lora_rank"] = case.lora_rank
    if case.finetuning == "qlora":
        settings["quantization_bit"] = 4
    if case.deepspeed:
        settings["deepspeed"] = str(case.deepspeed)
    return settings


def trl_job(case: Case, folder: Path) -> dict[str, Any]:
    """What `bench/trl_run.py` reads; the DeepSpeed JSON with the batch keys that transformers fills in."""
    deepspeed = None
    if case.deepspeed:
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        deepspeed = {
            **json.loads(case.deepspeed.read_bytes()),
            **dict.fromkeys((*auto, "gradient_clipping"), "auto"),
            "bf16": {"enabled": "auto"},
            "steps_per_print": 2**31 - 1,
        }
    return {
        "model": str(case.model),
        "pairs": str(folder / "pairs.jsonl"),
        "result": str(folder / "trl-result.json"),
        "output_dir": str(folder / "trl"),
        "finetuning": case.finetuning,
        "reference": case.reference,
        "lora_rank": case.lora_rank,
        "gradient_checkpointing": case.gradient_checkpointing,
        "max_length": case.pairs.max_length,
        "batch": case.batch,
        "steps": case.steps,
        "learning_rate": case.learning_rate,
        "beta": _BETA,
        "seed": case.seed,
        "device": case.device,
        "deepspeed": deepspeed,
    }
