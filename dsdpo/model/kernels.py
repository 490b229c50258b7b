"""Kernels of the decoder layers beside attention: transformers' own, Liger's, or compiled layers.

They are put on the modules of one loaded model. Nothing of transformers changes for a model that is loaded later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from dsdpo.config.kernels import LIGER_REMEDY, missing_liger
from dsdpo.errors import config_error
from dsdpo.model.liger import use_liger
from dsdpo.model.support import LIGER, unknown_to_liger

Kernels: TypeAlias = Literal["liger", "compile", "none"]

# Compilations of one layer's code: with and without gradients, with and without an adapter, in training and in
# evaluation, for layers that differ. Beyond the limit, which is 8 by default, torch runs a layer uncompiled.
_VARIANTS = 64
_RECOMPUTES = "forward_with_checkpointing"  # by which newer transformers replace the forward of each layer's class


def choose_kernels(asked: Literal["auto"] | Kernels, model_type: str, cuda: bool, liger: bool) -> Kernels:
    """What `kernels` means for a run.

    Args:
        model_type: of the model's config.
        cuda: whether the ranks compute on NVIDIA GPUs.
        liger: whether every rank can import Liger.

    Raises:
        ConfigError: Liger's kernels are asked for, and cannot be used.
    """
    if asked == "auto":
        return "liger" if cuda and liger and model_type in LIGER else "none"
    if asked != "liger":
        return asked
    if not cuda:
        text = "kernels is liger, which needs CUDA, and this run is on CPUs: set kernels: auto or none"
        raise config_error("no-cuda", "kernels", text)
    if not liger:
        missing = missing_liger() or "a package that liger-kernel needs is not installed on another node"
        raise config_error("liger-missing", "kernels", f"kernels is liger, but {missing}: {LIGER_REMEDY} on every node")
    if model_type not in LIGER:
        raise config_error("model-kernels", "kernels", unknown_to_liger(model_type))
    return "liger"


def apply_kernels(model: PreTrainedModel, kernels: Kernels) -> None:
    """Let the layers of a loaded model compute with these kernels. Adapters are put on before."""
    if kernels == "liger":
        use_liger(model)
    elif kernels == "compile":
        _compile_layers(model)


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The layers whose activations gradient checkpointing recomputes one at a time."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def _compile_layers(model: PreTrainedModel) -> None:
    """Compile the forward of each decoder layer for any length of the row; attention stays outside the graph.

    `forward` and not the module: hooks of DeepSpeed and PEFT stay outside. So does gradient checkpointing, whose call
    leaves every graph. Layers share their code, so it is compiled at the first layer and used by all. Random numbers
    are those of an uncompiled layer.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    for layer in decoder_layers(model):
        layer.forward = _compiled(layer)


def _compiled(layer: Any) -> Callable[..., Any]:
    forward = type(layer).forward
    recomputes_inside = forward.__code__.co_name == _RECOMPUTES
    if recomputes_inside:
        forward = forward.__wrapped__
    compiled = torch.compile(MethodType(forward, layer), dynamic=True, options={"fallback_random": True})

    def recomputed(*args: Any, **keywords: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(compiled, **keywords), *args)
        return compiled(*args, **keywords)

    return recomputed if recomputes_inside else compiled
