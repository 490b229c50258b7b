"""Configs of models that the benchmarks know by name, or read from a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig, LlamaConfig, PretrainedConfig


def _llama_2(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
    )


# As in the published config.json.
BUILT_IN = {
    "llama-2-7b": _llama_2(4096, 11008, 32, 32, 32),
    "llama-2-70b": _llama_2(8192, 28672, 80, 64, 8),
}


def load_config(name: str) -> PretrainedConfig:
    """Of a model of BUILT_IN, or of a folder with config.json. Ends the program with a message for anything else."""
    if name not in BUILT_IN and not (Path(name) / "config.json").exists():
        sys.exit(f"{name} is no folder with a config.json; built in are {', '.join(BUILT_IN)}")
    return BUILT_IN.get(name) or AutoConfig.from_pretrained(name, local_files_only=True)
