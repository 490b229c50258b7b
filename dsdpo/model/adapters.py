"""LoRA adapters around a frozen base model, through PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsdpo.compat import active_adapter, no_tensor_parallelism, same_trainable
from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError, config_error
from dsdpo.model.load import set_score
from dsdpo.model.targets import target_problems

SCORE = "score"  # the layer that gives a reward
SCORE_WEIGHT = f"base_model.model.{SCORE}.weight"  # in an adapter's file
REFERENCE = "reference"  # name of the frozen copy of a continued adapter


def add_lora(model: PreTrainedModel, config: RunConfig) -> peft.PeftModel:
    """Freeze `model` and put trainable adapters beside its linear layers; a `score` layer trains whole.

    The matrices A are drawn from the CPU generator, which is seeded here, so that all ranks get the same ones. B
    is 0: the tuned model starts as the base model.

    Raises:
        ConfigError: a name of lora_target matches no module of the model.
    """
    torch.manual_seed(config.seed)
    targets: str | list[str] = "all-linear" if config.lora_target == ["all"] else config.lora_target
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type=None if has_score(model) else peft.TaskType.CAUSAL_LM,
        exclude_modules=[SCORE] if has_score(model) else None,
    )
    layers = [(name, module) for name, module in model.named_modules() if name != SCORE]
    linear = [name for name, module in layers if isinstance(module, (nn.Linear, Conv1D))]
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if problems := target_problems(config.lora_target, linear, embeddings):
        raise ConfigError(problems)
    try:
        return _with_score(peft.get_peft_model(model, lora, autocast_adapter_dtype=False))
    except ValueError as error:
        raise config_error(
            "lora-target-unknown", "lora_target", f"lora_target {config.lora_target}: {error}"
        ) from error


def has_score(model: nn.Module) -> bool:
    """Whether a transformers model is one for sequence classification."""
    return hasattr(model, SCORE)


def _with_score(model: peft.PeftModel) -> peft.PeftModel:
    """Train the `score` layer where there is one, and say so in the adapter's config as PEFT does.

    PEFT would train a copy of the layer, which it cannot make of a partitioned one.
    """
    base: Any = model.get_base_model()
    if has_score(base):
        base.score.requires_grad_(True)
        settings: Any = model.peft_config["default"]
        settings.task_type, settings.modules_to_save, settings.exclude_modules = peft.TaskType.SEQ_CLS, [SCORE], None
        if isinstance(settings.target_modules, set):
            settings.target_modules.discard(SCORE)  # as PEFT spells all-linear out, before it excludes
    return model


def is_adapter(folder: str) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return (Path(folder) / "adapter_config.json").exists()


def load_lora(model: PreTrainedModel, folder: str, dropout: float = 0.0) -> peft.PeftModel:
    """Put a trained adapter on `model`, trainable, with `dropout` in place of what its adapter_config.json says.

    Raises:
        ConfigError: its matrices are not those of the model's modules.
    """
    lora: Any = peft.PeftConfig.from_pretrained(folder)
    lora.lora_dropout = dropout
    if has_score(model):
        weights = peft.load_peft_weights(folder, device="cpu")
        if SCORE_WEIGHT in weights:
            set_score(model, weights[SCORE_WEIGHT])
        lora.task_type = lora.modules_to_save = None
    exactly = {"config": lora, "is_trainable": True, "autocast_adapter_dtype": False}
    with no_tensor_parallelism():
        tuned = peft.PeftModel.from_pretrained(model, folder, **exactly)
    _check_complete(tuned, folder)
    return _with_score(tuned)


def _check_complete(tuned: peft.PeftModel, folder: str) -> None:
    """Raises ConfigError where an adapter's matrices are not those of the model's modules: PEFT draws what is missing,
    and leaves out what is too much."""
    wanted = _matrices(name for name, _ in tuned.named_parameters())
    held = _matrices(peft.load_peft_weights(folder, device="cpu"))
    if odd := sorted(wanted ^ held):
        text = (
            f"adapter_name_or_path: {len(odd)} matrices are in {folder} or in the model's modules alone, such as "
            f"{', '.join(odd[:2])}; take a complete copy of the adapter, and the model that it was trained on"
        )
        raise config_error("adapter-incomplete", "adapter_name_or_path", text)


def _matrices(names: Iterable[str]) -> set[str]:
    """Names of LoRA matrices as a file of an adapter has them."""
    return {name.replace(".default.", ".") for name in names if ".lora_A." in name or ".lora_B." in name}


def continue_lora(model: PreTrainedModel, folder: str, keep_reference: bool, dropout: float) -> peft.PeftModel:
    """Put a trained adapter on `model` to train it further.

    Args:
        model: the base model.
        folder: of the adapter.
        keep_reference: whether to keep a frozen copy beside it, for `reference_weights`. It computes in eval mode.
        dropout: on the input of the trained adapter.
    """
    policy = load_lora(model, folder, dropout)
    if keep_reference:
        with same_trainable(policy), no_tensor_parallelism():
            policy.load_adapter(folder, REFERENCE, is_trainable=False, autocast_adapter_dtype=False)
    return policy


def record_base_revision(model: nn.Module, revision: str | None) -> None:
    """Let the adapter_config.json of a PEFT model say at which revision its base is to be loaded."""
    if isinstance(model, peft.PeftModel):
        model.peft_config["default"].revision = revision


def reference_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, a PEFT model computes what the reference computes; any other model is left alone.

    That is the frozen copy of a continued adapter where `continue_lora` kept one, else the base model.
    """
    if not isinstance(model, peft.PeftModel):
        return nullcontext()
    return active_adapter(model, REFERENCE if REFERENCE in model.peft_config else None)
