"""AdamW: its parameter groups, its step and its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from dsdpo.compat import cpu_adamw
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig


def build_optimizer(
    groups: list[dict[str, Any]], config: RunConfig, zero: ZeroConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW: torch's, or DeepSpeed's vectorized one for a state that is offloaded to the CPU or to NVMe."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if zero.offload_optimizer != "none":
        return cpu_adamw(groups, **settings)
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **settings)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in one group, or in two when there is weight decay: matrices with it, the rest without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trainable, "weight_decay": 0.0}]
    # ZeRO-3 has replaced the data by an empty vector; ds_shape keeps the true shape.
    matrices = [len(getattr(p, "ds_shape", p.shape)) >= 2 for p in trainable]
    return [
        {
            "params": [p for p, is_matrix in zip(trainable, matrices) if is_matrix == decayed],
            "weight_decay": decay,
        }
        for decayed, decay in ((True, weight_decay), (False, 0.0))
        if decayed in matrices
    ]


def optimizer_step(engine: DeepSpeedEngine) -> torch.Tensor | float:
    """engine.step(): updates the weights at a gradient accumulation boundary and does nothing before it.

    Returns:
        The global L2 norm of the averaged gradients before clipping; 0 where there was no update. ZeRO computes it;
        for stage 0 it is taken here, from `.grad`, which is whole and averaged there.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return 0.0
    if engine.zero_optimization():
        engine.step()
        return engine.get_global_grad_norm()
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return grad_norm


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Set it on every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
