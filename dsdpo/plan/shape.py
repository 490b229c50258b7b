"""Sizes of a model: from its config alone, without reading a weight, or of a loaded one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from dsdpo.compat import unpacked_shape

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_LAYER = re.compile(r"\.(\d+)\.")  # the number of a decoder layer is the first one in a parameter's name
_LORA = ".lora_"


class TensorShape(NamedTuple):
    """Name and shape of a parameter, and whether it is trained."""

    name: str
    shape: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class ModelShape:
    """What of a decoder-only model decides its operations, memory and traffic.

    Attributes:
        layers: decoder layers.
        hidden: size of the hidden states.
        vocab: size of the vocabulary.
        key_value: size of a token's keys in a layer, all heads together; the values have as much.
        intermediate: size of the MLP.
        linear: weights of the linear maps in all decoder layers, without adapters.
        lora: weights of the LoRA matrices in training; 0 without.
        total: weights of the model, adapters included.
        trained: those in training.
        largest: weights of the largest module that ZeRO-3 gathers at once, a decoder layer or the embeddings.
        largest_tensor: of the largest parameter.
    """

    layers: int
    hidden: int
    vocab: int
    key_value: int
    intermediate: int
    linear: int
    lora: int
    total: int
    trained: int
    largest: int
    largest_tensor: int

    @property
    def modules(self) -> int:
        """In which ZeRO-3 gathers a model: its layers, embeddings and head."""
        return self.layers + 2

    @property
    def is_lora(self) -> bool:
        """Whether some weights are frozen."""
        return self.trained < self.total

    @classmethod
    def from_config(cls, config: PretrainedConfig, lora_rank: int = 0) -> ModelShape:
        """Of an untrained model, built on torch's meta device.

        Args:
            lora_rank: of adapters on every linear map of the decoder layers; 0 for full fine-tuning.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = [TensorShape(name, tuple(p.shape), not lora_rank) for name, p in model.named_parameters()]
        maps = [tensor for tensor in tensors if _is_linear_map(tensor)] if lora_rank else []
        for name, (rows, columns), _ in maps:
            tensors.append(TensorShape(f"{name}{_LORA}A", (lora_rank, columns), True))
            tensors.append(TensorShape(f"{name}{_LORA}B", (rows, lora_rank), True))
        return cls.from_tensors(config, tensors)

    @classmethod
    def from_module(cls, module: torch.nn.Module) -> ModelShape:
        """Of a loaded model with a `config`, with or without adapters, partitioned by ZeRO-3, quantized or not."""
        tensors = [TensorShape(name, unpacked_shape(p), p.requires_grad) for name, p in module.named_parameters()]
        return cls.from_tensors(module.config, tensors)  # type: ignore[arg-type]

    @classmethod
    def from_tensors(cls, config: PretrainedConfig, tensors: Iterable[TensorShape]) -> ModelShape:
        """Of a model with these parameters. Needs neither torch nor transformers.

        Args:
            config: sizes under Hugging Face's names, or their `attribute_map`.
            tensors: each once, so of tied ones the first.
        """
        tensors = list(tensors)
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or hidden // heads
        by_layer: Counter[str] = Counter()
        for name, shape, _ in tensors:
            layer = _LAYER.search(name)
            by_layer[layer[0] if layer else name] += prod(shape)
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            vocab=config.vocab_size,
            key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
            linear=sum(prod(tensor.shape) for tensor in tensors if _is_linear_map(tensor)),
            lora=sum(prod(shape) for name, shape, trained in tensors if trained and _LORA in name),
            total=sum(prod(tensor.shape) for tensor in tensors),
            trained=sum(prod(tensor.shape) for tensor in tensors if tensor.trained),
            largest=max(by_layer.values()),
            largest_tensor=max(prod(tensor.shape) for tensor in tensors),
        )


def _is_linear_map(tensor: TensorShape) -> bool:
    """Whether it is a weight matrix of a decoder layer."""
    return len(tensor.shape) == 2 and _LORA not in tensor.name and _LAYER.search(tensor.name) is not None
