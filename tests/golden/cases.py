"""The golden runs: short, fp32, on the CPU. Adding one is one line in CASES."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAVED_STEP = 2  # where a case that is resumed has a checkpoint

# 21 pairs: steps of 8, 8 and 5, then a second epoch. A step takes several micro-steps of 64 tokens, and the longest
# pairs are truncated to 24 tokens.
PAIRS = 21
HELD_OUT = 6
COMMON: dict[str, Any] = {
    "max_length": 24,
    "truncation_mode": "keep_start",
    "max_tokens_per_row": 64,
    "train_batch_size": 8,
    "max_steps": 5,
    "warmup_steps": 1,
    "save_steps": None,
    "precision": "fp32",
    "disable_tqdm": True,
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "learning_rate": 0.01}
FULL = {"finetuning_type": "full", "weight_decay": 0.1, "learning_rate": 0.001}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: unique.
        ranks: number of processes.
        zero: ZeRO stage; 0 runs without a DeepSpeed JSON.
        options: of the run config, beside COMMON.
        resumes: name of an earlier case of the same options, whose checkpoint after SAVED_STEP this run continues.
    """

    name: str
    ranks: int
    zero: int
    options: dict[str, Any] = field(default_factory=dict)
    resumes: str | None = None


CASES = [
    Case("lora", 1, 0, {**LORA, "save_steps": SAVED_STEP}),
    Case("lora-resumed-on-2", 2, 3, LORA, resumes="lora"),
    Case("lora-live", 2, 3, {**LORA, "reference": "live"}),
    Case("lora-simpo", 1, 2, {**LORA, "loss_type": "simpo", "beta": 2.0}),
    Case("lora-evaluation", 2, 2, {**LORA, "eval_dataset": "held_out.jsonl", "eval_steps": 2}),
    Case("full", 2, 2, {**FULL, "save_steps": SAVED_STEP}),
    Case("full-resumed-on-1", 1, 3, FULL, resumes="full"),
    Case("full-live", 1, 0, {**FULL, "reference": "live"}),
    Case("full-aot", 2, 3, {**FULL, "loss_type": "aot"}),
    Case("full-unshared-prompt", 2, 0, {**FULL, "share_prefix": False}),
]
