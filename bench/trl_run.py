"""TRL's side, one rank of it: `python -m bench.trl_run JOB.json` trains and writes what it measured.

The job holds token ids in the order of dsdpo's steps, so TRL's own reading and tokenizing stay out of the comparison.
Everything that is timed is TRL's own code.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step, from its first forward to the end of the update: no loading, no logging."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batch is there."""
        if not self.seconds:
            print("bench: the first step begins", flush=True)
        self._started = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The weights are updated."""
        self.seconds.append(now() - self._started)


def now() -> float:
    """Seconds, when the device has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Trainer(DPOTrainer):
    """DPOTrainer that takes token ids, keeps every step's loss, and times its reference pass."""

    reference_seconds: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step_losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        started = now()
        result = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds = now() - started
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in TRL."""
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.detach())
        return loss


def settings(job: dict[str, Any], world_size: int) -> DPOConfig:
    """TRL's defaults but for what both sides share; `liger` adds Liger's kernels."""
    return DPOConfig(
        output_dir=job["output_dir"],
        per_device_train_batch_size=job["batch"] // world_size // job["accumulation"],
        gradient_accumulation_steps=job["accumulation"],
        max_steps=job["steps"],
        train_sampling_strategy="sequential",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=job["beta"],
        max_length=job["max_length"],
        precompute_ref_log_probs=job["reference"] == "cached",
        gradient_checkpointing=job["gradient_checkpointing"],
        use_liger_kernel=job["liger"],
        bf16=job["device"] == "cuda",
        use_cpu=job["device"] == "cpu",
        deepspeed=job["deepspeed"],
        dataloader_pin_memory=job["device"] == "cuda",
        seed=job["seed"],
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )


def train(job: dict[str, Any]) -> None:
    """Train and write job["result"] on rank 0."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args = settings(job, world_size)  # before the model, which ZeRO-3 partitions as it is loaded
    if job["deepspeed"]:
        # accelerate does this on GPUs; on a CPU it makes a gloo group, of which DeepSpeed does not know.
        deepspeed.init_distributed(verbose=False)
    dtype = torch.bfloat16 if job["device"] == "cuda" else torch.float32
    quantized: dict[str, Any] = {}
    if job["finetuning"] == "qlora":
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        place = int(os.environ.get("LOCAL_RANK", "0")) if job["device"] == "cuda" else "cpu"
        quantized = {"quantization_config": four_bits, "device_map": {"": place}}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, **quantized)
    lora = LoraConfig(
        r=job["lora_rank"],
        lora_alpha=2 * job["lora_rank"],
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )
    times = StepTimes()
    trainer = Trainer(
        model,
        args=args,
        # A file, so that all ranks find the reference log-probs that rank 0 caches beside it.
        train_dataset=load_dataset("json", data_files=job["pairs"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=None if job["finetuning"] == "full" else lora,
        callbacks=[times],
    )
    trainer.train()
    losses = torch.stack(trainer.step_losses).view(job["steps"], -1).sum(dim=1)
    losses = trainer.accelerator.reduce(losses, "mean")
    result = {
        "losses": losses.tolist(),
        "seconds": times.seconds,
        "reference_seconds": trainer.reference_seconds,
        "gpu_peak_gb": torch.cuda.max_memory_allocated() / 2**30 if job["device"] == "cuda" else None,
    }
    if trainer.accelerator.is_main_process:
        Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[-1]).read_bytes()))
