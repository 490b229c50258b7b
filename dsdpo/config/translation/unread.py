"""What stands in other trainers' files, and a run does not read: beside their options it is no mistake."""

from __future__ import annotations

from typing import Any

from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.config.translation.rules import NOT_SET, Given, is_off, number

_SHAPE = ("lora_rank", "lora_r", "lora_alpha", "lora_target", "lora_target_modules")
_OF_ADAPTERS = (*_SHAPE, "lora_dropout")
_OF_FOUR_BITS = ("quantization_type", "double_quantization")
_OF_LOSSES = ("simpo_gamma", "discopop_tau", "f_alpha_divergence_coef", "cpo_alpha")
_MEANS_NONE = ("max_length", "max_grad_norm")  # their null is no "not set"


def unread(name: str, value: Any, given: Given, stage: str, is_full: bool) -> str:
    """Why an option is not read; empty where it is.

    Args:
        given: all options of the run, as they were given.
        is_full: whether every parameter is trained.
    """
    if is_full and name in _OF_ADAPTERS:
        return "finetuning_type is full"
    if given.get("adapter_name_or_path") and name in _SHAPE and is_off(given.get("create_new_adapter")):
        return "the adapter in adapter_name_or_path has its own"
    if name in _OF_FOUR_BITS and number(given.get("quantization_bit")) != 4 and is_off(given.get("load_in_4bit")):
        return "quantization_bit is not 4"
    if name not in RunConfig.model_fields:
        return ""
    is_noise = name == "neftune_noise_alpha" and not is_off(value)  # other trainers have it in every stage
    is_of_stage = any(name in spec.options for spec in STAGES.values())
    if is_of_stage and name not in STAGES[stage].options and not is_noise:
        return f"stage {stage} does not read it"
    if name in _OF_LOSSES and number(value) == RunConfig.model_fields[name].default:
        return "it is the default"
    return NOT_SET if value is None and name not in _MEANS_NONE else ""
