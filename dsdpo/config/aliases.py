"""What to write for a name that is no option: options of further trainers (OpenRLHF, axolotl), and misspelt ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_BATCH = (
    "set train_batch_size (examples per optimizer step over all GPUs) and max_tokens_per_row (what one GPU "
    "computes at a time); the number of accumulation steps follows"
)
_LAUNCH = "it is an argument of `dsdpo train` (--num_accelerators, --hostfile, ...), not of the run config"

ELSEWHERE = {
    "micro_train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "max_len": "set max_length",
    "sequence_len": "set max_length",
    "model_name": "set model_name_or_path",
    "pretrain": "set model_name_or_path",
    "base_model": "set model_name_or_path",
    "train_on_inputs": "stage sft trains on the assistant's words alone; delete the line",
    "lambda_orpo": "set loss_type: orpo and beta",
    "r": "set lora_rank",
    "target_modules": "set lora_target",
    "train_file": "set dataset",
    "system_prompt": "set default_system",
    "lr": "set learning_rate",
    "lr_scheduler": "set lr_scheduler_type",
    "epochs": "set num_train_epochs",
    "num_epochs": "set num_train_epochs",
    "deepspeed_config": "set deepspeed",
    "zero_stage": "set deepspeed: zero3 (or zero1, zero2)",
    "num_processes": _LAUNCH,
    "num_accelerators": _LAUNCH,
    "num_gpus": _LAUNCH,
    "num_nodes": _LAUNCH,
    "hostfile": _LAUNCH,
    "master_port": _LAUNCH,
}


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an unknown-key message: what to write instead, or where to look."""
    key = name.replace("-", "_")
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    close = did_you_mean(key, known)
    return close or "`dsdpo train --help` lists every option"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean x?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""
