"""Training with plain DeepSpeed and saving as other trainers do; runs on every rank of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from dsdpo.compat import unlink_shared_buffers, zero3_loading
from dsdpo.runtime.env import launched
from tests.helpers.tiny import VOCAB, save_tokenizer

STEPS = 2


class Case(NamedTuple):
    """A run of another trainer.

    Attributes:
        model: folder of the base model.
        stage: of ZeRO.
        lora: train an adapter.
        bf16: train in bf16.
        keep_frozen: save the frozen parameters too, which the Hugging Face Trainer leaves out.
        wrapped: the engine's module holds the model as `model`, and the output head's weight as `head` again.
    """

    model: str
    stage: int
    lora: bool = False
    bf16: bool = False
    keep_frozen: bool = False
    wrapped: bool = False

    @property
    def name(self) -> str:
        """A folder's name."""
        return "-".join([self.model, f"zero{self.stage}", *(key for key in self._fields[2:] if getattr(self, key))])


class Wrapped(nn.Module):
    """A model with its output head's weight once more, as trainers with a loss of their own have it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Module()
        self.head.weight = model.get_output_embeddings().weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.model(ids)


def ds_config(case: Case) -> dict[str, Any]:
    """In which even tiny parameters are partitioned."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": case.bf16},
    }


def train_and_save(folder: str, cases: list[Case], ids: list[int]) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Train each case and save it to `folder`/case/checkpoint-2, as the Hugging Face Trainer would.

    Returns:
        For each case, by parameter name the trained fp32 master weights, and the engine's fp32 logits for `ids`.
    """
    mesh = launched()
    assert mesh is not None
    deepspeed.init_distributed("gloo", verbose=False)
    deepspeed.comm.barrier()
    unlink_shared_buffers(mesh.rank)
    results = []
    for case in cases:
        engine = _engine(Path(folder), case)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(2 * step + mesh.rank)
            batch = torch.randint(3, VOCAB, (1, 12), generator=generator)
            logits = engine(batch).logits.float()
            engine.backward(nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:]))
            engine.step()
        results.append((_masters(engine, case), _logits(engine, ids)))
        _save(engine, Path(folder, case.name, "checkpoint-2"), case, mesh.is_main)
        engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def _engine(folder: Path, case: Case) -> Any:
    settings = ds_config(case)
    with zero3_loading(settings):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder / case.model, dtype=torch.bfloat16 if case.bf16 else torch.float32
        )
    if case.lora:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if case.wrapped:
        model = Wrapped(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _masters(engine: Any, case: Case) -> dict[str, np.ndarray]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter) if case.stage else parameter.detach()
            found[name.removeprefix("model.") if case.wrapped else name] = master.float().cpu().numpy().copy()
    return found


def _logits(engine: Any, ids: list[int]) -> np.ndarray:
    engine.eval()
    with torch.no_grad():
        return engine(torch.tensor([ids])).logits[0].float().numpy()


def _save(engine: Any, folder: Path, case: Case, is_main: bool) -> None:
    model = engine.module.model if case.wrapped else engine.module
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=case.lora and not case.keep_frozen)
    if not is_main:
        return
    if case.lora:
        model.peft_config["default"].save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        GenerationConfig(max_new_tokens=7).save_pretrained(folder)
    save_tokenizer(folder)
