"""Sizes of a model from its config alone: built on no device, no weight is read."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from bench.flops import Shape
from bench.traffic import Sizes


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


@dataclass(frozen=True)
class Model:
    """A model's config, and what it makes.

    Attributes:
        total: weights.
        largest: weights of one decoder layer, or of the embeddings where they are more.
        maps: shapes of the linear maps in all decoder layers.
    """

    config: PretrainedConfig
    total: int
    largest: int
    maps: list[tuple[int, int]]

    def shape(self, lora_rank: int) -> Shape:
        """For bench/flops.py, with adapters of this rank on every linear map of the layers; 0: none."""
        return Shape(
            layers=self.config.num_hidden_layers,
            hidden=self.config.hidden_size,
            vocab=self.config.vocab_size,
            linear=sum(a * b for a, b in self.maps),
            lora=lora_rank * sum(a + b for a, b in self.maps),
        )

    def sizes(self, lora_rank: int) -> Sizes:
        """For bench/traffic.py."""
        adapters = self.shape(lora_rank).lora
        return Sizes(
            total=self.total + adapters,
            trained=adapters or self.total,
            largest=self.largest + adapters // self.config.num_hidden_layers,
            modules=self.config.num_hidden_layers + 2,
        )


def load_model(name: str) -> Model:
    """A model of BUILT_IN, or of a folder with config.json. Ends the program with a message for anything else."""
    if name not in BUILT_IN and not (Path(name) / "config.json").exists():
        sys.exit(f"{name} is no folder with a config.json; built in are {', '.join(BUILT_IN)}")
    return measure(BUILT_IN.get(name) or AutoConfig.from_pretrained(name, local_files_only=True))


def measure(config: PretrainedConfig) -> Model:
    """Count the weights of a config's model on torch's meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    maps = [(p.shape[0], p.shape[1]) for p in layers.parameters() if p.dim() == 2]
    embeddings = model.get_input_embeddings().weight.numel()
    return Model(
        config=config,
        total=sum(p.numel() for p in model.parameters()),
        largest=max(embeddings, sum(p.numel() for p in layers[0].parameters())),
        maps=maps,
    )
