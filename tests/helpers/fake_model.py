"""A model folder by its looks: all that the check before a run reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 2048}
LINEAR = {
    **{f"self_attn.{name}_proj": (16, 16) for name in "qkvo"},
    **{f"mlp.{name}_proj": (32, 16) for name in ("gate", "up", "down")},
}


def tensors() -> dict[str, np.ndarray]:
    """Names and shapes of a llama of one layer."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, 16), "lm_head.weight": (8, 16)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in LINEAR.items()}
    shapes["model.layers.0.input_layernorm.weight"] = (16,)
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


def save_fake_model(folder: Path, **settings: Any) -> Path:
    """A folder with config.json, weights and a file that is named like a tokenizer's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | settings))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors(), folder / "model.safetensors")
    return folder
