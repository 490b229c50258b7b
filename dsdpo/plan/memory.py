"""How long a packed row may be, for `max_tokens_per_row: auto`: an estimate of the memory that a row's tokens take."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine, comm
from transformers import PretrainedConfig

from dsdpo.config.schema import RunConfig
from dsdpo.engine.engine import Hardware

CPU_ROW_TOKENS = 8192
_GRANULE = 256
_USABLE = 0.9  # of the GPU's memory; the rest goes to fragmentation, NCCL and the CUDA context
_ADAM_BYTES = 8  # two fp32 moments, which appear in the first step
_GRAD_BYTES = 4


def activation_bytes_per_token(model: PretrainedConfig, element: int, checkpointing: bool) -> int:
    """What one token of a row keeps in memory until the backward pass.

    For each layer, with hidden size h, key/value size g, MLP size i and e bytes an element:
    e (8h + 6g + 4i) for the inputs of the linear layers, attention, residuals and activation, and 8h for the norms'
    copies in fp32. With gradient checkpointing, e h for each layer and the above for one.

    Args:
        model: sizes under Hugging Face's names, or their `attribute_map`.
        element: bytes of an activation: 2 in bf16, 4 in fp32.
        checkpointing: whether layers are recomputed.
    """
    h, layers = model.hidden_size, model.num_hidden_layers
    heads = model.num_attention_heads
    head_size = getattr(model, "head_dim", None) or h // heads
    g = (getattr(model, "num_key_value_heads", None) or heads) * head_size
    i = getattr(model, "intermediate_size", None) or 4 * h
    layer = element * (8 * h + 6 * g + 4 * i) + 8 * h
    return layers * element * h + layer if checkpointing else layers * layer


def optimizer_bytes(trainable: int, stage: int, world_size: int) -> int:
    """What training adds to a fresh engine on each rank: Adam's moments and the gradients, both in fp32.

    ZeRO shards the moments from stage 1 on and the gradients from stage 2 on.
    """
    moments = _ADAM_BYTES * trainable // (world_size if stage >= 1 else 1)
    return moments + _GRAD_BYTES * trainable // (world_size if stage >= 2 else 1)


def longest_row(free: int, per_token: int, max_length: int) -> int:
    """Tokens that fit into `free` bytes, in steps of 256; never below the 2 * max_length that one pair may take."""
    return max(2 * max_length, free // per_token // _GRANULE * _GRANULE)


def row_tokens(config: RunConfig, engine: DeepSpeedEngine, hardware: Hardware) -> int:
    """The run's `max_tokens_per_row`, the same on all ranks. A collective call when it is `auto` on CUDA."""
    if config.row_tokens is not None:
        return config.row_tokens
    if hardware.device.type != "cuda":
        return max(CPU_ROW_TOKENS, 2 * config.max_length)
    parameters = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    element = hardware.dtype.itemsize
    largest = max(n for n, _ in parameters)  # the embeddings or the head, gathered whole, and as much again
    _, total = torch.cuda.mem_get_info(hardware.device)
    free = (
        int(total * _USABLE)
        - torch.cuda.memory_allocated(hardware.device)
        - optimizer_bytes(sum(n for n, t in parameters if t), engine.zero_optimization_stage(), comm.get_world_size())
        - 2 * element * largest
    )
    per_token = activation_bytes_per_token(engine.module.config, element, config.gradient_checkpointing)
    found = torch.tensor(longest_row(max(free, 0), per_token, config.max_length), device=hardware.device)
    comm.all_reduce(found, op=comm.ReduceOp.MIN)
    return int(found)
