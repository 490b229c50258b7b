"""What must hold between options. Each rule returns a message, or an empty string when all is well."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Mapping
from typing import Any

from dsdpo.config import trackers
from dsdpo.config.kernels import KERNEL_RULES, liger_installed
from dsdpo.config.load import LoadResult
from dsdpo.config.loss_rules import LOSS_RULES, Given, Rule
from dsdpo.config.quantization import QUANTIZATION_RULES
from dsdpo.config.schedule_rules import SCHEDULE_RULES
from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.errors import Problem
from dsdpo.runtime.rundir import run_of_merged


def check_rules(loaded: LoadResult, here: bool = True) -> list[Problem]:
    """What all rules say whose options are themselves valid.

    Args:
        here: whether the run is to start here, with the packages that are installed.
    """
    if loaded.config is None:
        return []
    problems = []
    packages = (_trackers, _flash_package, liger_installed)
    for code, keys, rule in RULES if here else [one for one in RULES if one[2] not in packages]:
        message = "" if loaded.faulty.intersection(keys) else rule(loaded.config, loaded.origins)
        if message:
            places = [f"{key} in {loaded.origins[key]}" for key in keys if key in loaded.origins]
            text = f"{message} [{', '.join(places)}]" if places else message
            problems.append(Problem(code, keys[0], text))
    return problems


def _row_fits_a_pair(config: RunConfig, given: Given) -> str:
    answers = 2 if STAGES[config.stage].records in ("pairs", "labelled") else 1
    if config.row_tokens is None or config.row_tokens >= answers * config.max_length:
        return ""
    return (
        f"max_tokens_per_row is {config.row_tokens}, but an example may take {answers} * max_length = "
        f"{answers * config.max_length} tokens; raise max_tokens_per_row, lower max_length or leave it empty"
    )


def _stage_options(config: RunConfig, given: Given) -> str:
    own = STAGES[config.stage].options
    for stage, spec in STAGES.items():
        if foreign := [option for option in spec.options if option in given and option not in own]:
            return (
                f"{', '.join(foreign)} set beside stage {config.stage}, which does not read "
                f"{'it' if len(foreign) == 1 else 'them'}; delete that, or set stage: {stage}"
            )
    return ""


def _one_held_out_set(config: RunConfig, given: Given) -> str:
    if config.eval_dataset and config.val_size:
        return "eval_dataset and val_size are both set; keep the one that names your held-out pairs"
    return ""


def _val_size(config: RunConfig, given: Given) -> str:
    if config.val_size > 1 and config.val_size != int(config.val_size):
        return f"val_size is {config.val_size}; allowed: a fraction below 1, or a whole number of pairs"
    return ""


def _mix(config: RunConfig, given: Given) -> str:
    if config.mix_strategy == "concat":
        if config.interleave_probs is not None:
            return "interleave_probs is set, but mix_strategy is concat; set interleave_under or interleave_over"
        return ""
    if config.interleave_probs is not None and len(config.interleave_probs) != len(config.dataset):
        return f"interleave_probs has {len(config.interleave_probs)} numbers for {len(config.dataset)} sets of dataset"
    if any(not (math.isfinite(share) and share > 0) for share in config.interleave_probs or ()):
        return (
            f"interleave_probs is {config.interleave_probs}; each must be above 0: leave a set out of dataset instead"
        )
    if config.val_size and config.val_split == "example":
        return f"mix_strategy {config.mix_strategy} needs val_split: prompt, or an eval_dataset"
    return ""


def _new_adapter(config: RunConfig, given: Given) -> str:
    if config.create_new_adapter and run_of_merged(config.model_name_or_path) is None:
        return (
            f"create_new_adapter is set, but model_name_or_path {config.model_name_or_path} is no output_dir of a run "
            "with an adapter; delete it, or name such a run"
        )
    return ""


def _something_to_evaluate(config: RunConfig, given: Given) -> str:
    if config.eval_steps and not (config.eval_dataset or config.val_size):
        return f"eval_steps is {config.eval_steps}, but nothing is held out; set eval_dataset or val_size"
    return ""


def _lora_options(config: RunConfig, given: Given) -> str:
    shape = [key for key in ("lora_rank", "lora_alpha", "lora_target") if key in given]
    if config.adapter_name_or_path and shape:
        return (
            f"{', '.join(shape)} set beside adapter_name_or_path, whose adapter has its own; delete "
            f"{'it' if len(shape) == 1 else 'them'}"
        )
    useless = [key for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target") if key in given]
    if config.adapter_name_or_path:
        useless.append("adapter_name_or_path")
    if config.finetuning_type == "full" and useless:
        return (
            f"{', '.join(useless)} set while finetuning_type is full, which has no adapters; "
            "delete that or set finetuning_type: lora"
        )
    return ""


HEAD = "the output head, whose weights stay frozen here"
HEAD_NAMES = ("lm_head", "embed_out")


def _reaches_head(modules: str | list[str]) -> bool:
    """Whether modules as PEFT takes them are to reach the head: the ends of names, or a regular expression."""
    if isinstance(modules, str):
        return any(re.fullmatch(modules, name) for name in HEAD_NAMES)
    return any(module.split(".")[-1] in HEAD_NAMES for module in modules)


def _lora_target(config: RunConfig, given: Given) -> str:
    targets = config.lora_target
    if not targets:
        return "lora_target is empty; allowed: all, or names of linear layers such as q_proj,v_proj"
    if "all" in targets and len(targets) > 1:
        return f"lora_target is {','.join(targets)}; `all` stands alone"
    if _reaches_head(targets):
        return f"lora_target names {HEAD}; take it off the list"
    return ""


# Keys of adapter_config.json under which an adapter is more than LoRA matrices beside frozen weights. It then has parts
# without a second copy for the reference, or needs PEFT's own forward pass, or whole weights where ZeRO-3 has pieces.
_BEYOND_LORA = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "mica")  # init_lora_weights that loading carries out again


def adapter_problems(settings: Mapping[str, Any]) -> list[str]:
    """Why an adapter with these settings, the content of its adapter_config.json, cannot be trained further.

    Returns:
        The ends of sentences that begin with the file's name.
    """
    if settings.get("peft_type") != "LORA":
        return [f"peft_type is {settings.get('peft_type', 'missing')}; allowed: LORA"]
    beyond = [key for key in _BEYOND_LORA if settings.get(key)]
    if settings.get("bias", "none") != "none":
        beyond.append("bias")
    if str(settings.get("init_lora_weights")).startswith(_CHANGES_BASE):
        beyond.append("init_lora_weights")
    problems = [f"{key} is {settings[key]}; only plain LoRA can be trained further" for key in beyond]
    try:
        targets, excluded = (settings.get(key) or [] for key in ("target_modules", "exclude_modules"))
        if _reaches_head(targets) and not _reaches_head(excluded):
            problems.append(f"target_modules is {targets}, which reaches {HEAD}")
    except (re.error, TypeError, AttributeError):
        problems.append("target_modules or exclude_modules is neither a list of names nor a regular expression")
    return problems


def _trackers(config: RunConfig, given: Given) -> str:
    return trackers.problem(config.report_to)


# attn_implementation -> its package and how to get it. flash-attn and flash-attn-4 share the module flash_attn, so
# that distributions are looked for, not modules.
_FLASH_PACKAGES = {
    "flash_attention_2": ("flash-attn", "run `pip install 'dsdpo[flash]'`"),
    "flash_attention_3": ("flash-attn-3", "build it from the folder hopper of flash-attention"),
    "flash_attention_4": ("flash-attn-4", "run `pip install --pre flash-attn-4`"),
}


def missing_flash_package(attn_implementation: str) -> str:
    """What to say when the package behind an attention implementation is not installed, or an empty string."""
    package, remedy = _FLASH_PACKAGES.get(attn_implementation, ("", ""))
    if not package or any(importlib.metadata.distributions(name=package)):
        return ""
    return (
        f"attn_implementation is {attn_implementation}, but the package {package} is not installed; {remedy}, or set "
        "varlen (torch's own) or auto"
    )


def _attention(config: RunConfig, given: Given) -> str:
    wanted = config.attn_implementation
    if config.precision == "fp32" and wanted in ("varlen", *_FLASH_PACKAGES):
        return f"attn_implementation {wanted} computes in bf16 or fp16, but precision is fp32; change one of them"
    return ""


def _flash_package(config: RunConfig, given: Given) -> str:
    return missing_flash_package(config.attn_implementation)


RULES: list[Rule] = [
    ("row-too-short", ("max_tokens_per_row", "max_length"), _row_fits_a_pair),
    ("stage-options", ("stage", *(name for spec in STAGES.values() for name in spec.options)), _stage_options),
    *LOSS_RULES,
    *QUANTIZATION_RULES,
    *KERNEL_RULES,
    *SCHEDULE_RULES,
    ("held-out-twice", ("eval_dataset", "val_size"), _one_held_out_set),
    ("val-size", ("val_size",), _val_size),
    ("create-new-adapter", ("create_new_adapter", "model_name_or_path"), _new_adapter),
    ("mix", ("mix_strategy", "interleave_probs", "dataset", "val_size", "val_split"), _mix),
    ("nothing-held-out", ("eval_steps", "eval_dataset", "val_size"), _something_to_evaluate),
    (
        "lora-options",
        ("finetuning_type", "adapter_name_or_path", "lora_rank", "lora_alpha", "lora_dropout", "lora_target"),
        _lora_options,
    ),
    ("lora-target", ("lora_target",), _lora_target),
    ("tracker-missing", ("report_to",), _trackers),
    ("attention", ("attn_implementation", "precision"), _attention),
    ("attention", ("attn_implementation",), _flash_package),
]
