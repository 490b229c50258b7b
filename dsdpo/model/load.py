"""Loading a model for training."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from dsdpo.compat import zero3_loading
from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.model.families import check_supported

_HASH_BLOCK = 1 << 24


def load_causal_lm(
    model_name_or_path: str,
    config: RunConfig,
    engine_config: dict[str, Any],
    attn_implementation: str,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Load a whole model; with a stage 3 engine config, partitioned as it is loaded.

    Args:
        model_name_or_path: folder or hub id.
        config: the run.
        engine_config: the DeepSpeed config that the engine will be made with.
        attn_implementation: a registered packed backend.
        dtype: of the weights in memory.

    Raises:
        ConfigError: the model's attention cannot run on packed rows.
    """
    model_config = AutoConfig.from_pretrained(model_name_or_path)
    check_supported(model_config, config.max_length, config.disable_dropout, attn_implementation)
    if config.disable_dropout:
        _zero_dropout(model_config)
    with zero3_loading(engine_config):
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, config=model_config, dtype=dtype, attn_implementation=attn_implementation
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _zero_dropout(model_config: PretrainedConfig) -> None:
    """Set every dropout probability of a model config to 0: `attention_dropout`, `resid_pdrop` and the like."""
    for key, value in model_config.to_dict().items():
        if key.endswith(("dropout", "pdrop", "dropout_rate")) and isinstance(value, float):
            setattr(model_config, key, 0.0)


def weights_digest(model_name_or_path: str) -> str:
    """sha256 over the names and bytes of the weight files that the model loads from.

    A hub id is looked up in the local cache, where loading has put it before.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(model_name_or_path, local_files_only=True))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ConfigError(f"{folder} holds no *.safetensors or *.bin weights: check model_name_or_path")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest()
