"""What must hold between options. Each rule returns a message, or an empty string when all is well."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping

from dsdpo.config.load import LoadResult
from dsdpo.config.schema import RunConfig

Given = Mapping[str, str]  # explicitly set key -> place


def check_rules(loaded: LoadResult) -> list[str]:
    """Messages of all rules whose options are themselves sound."""
    if loaded.config is None:
        return []
    problems = []
    for keys, rule in RULES:
        message = "" if loaded.faulty.intersection(keys) else rule(loaded.config, loaded.origins)
        if message:
            places = [f"{key} in {loaded.origins[key]}" for key in keys if key in loaded.origins]
            problems.append(f"{message} [{', '.join(places)}]" if places else message)
    return problems


def _row_fits_a_pair(config: RunConfig, given: Given) -> str:
    if config.row_tokens >= 2 * config.max_length:
        return ""
    return (
        f"max_tokens_per_row is {config.row_tokens}, but a pair may take 2 * max_length = "
        f"{2 * config.max_length} tokens; raise max_tokens_per_row, lower max_length or leave it empty"
    )


def _losses(config: RunConfig, given: Given) -> str:
    if len(set(config.loss_type)) != len(config.loss_type):
        return f"loss_type names a loss twice: {', '.join(config.loss_type)}; name each once"
    if "sigmoid" not in config.loss_type:
        return f"loss_type is {config.loss_type}; stage dpo needs sigmoid in it, such as [sigmoid, sft]"
    return ""


def _loss_weights(config: RunConfig, given: Given) -> str:
    if config.loss_weights is None:
        return ""
    if len(config.loss_weights) != len(config.loss_type):
        return (
            f"loss_weights has {len(config.loss_weights)} number(s) for the {len(config.loss_type)} loss(es) "
            "of loss_type; give one each"
        )
    if min(config.loss_weights) < 0:
        return f"loss_weights is {config.loss_weights}; a weight is at least 0"
    return ""


def _one_held_out_set(config: RunConfig, given: Given) -> str:
    if config.eval_dataset and config.val_size:
        return "eval_dataset and val_size are both set; keep the one that names your held-out pairs"
    return ""


def _val_size(config: RunConfig, given: Given) -> str:
    if config.val_size > 1 and config.val_size != int(config.val_size):
        return f"val_size is {config.val_size}; allowed: a fraction below 1, or a whole number of pairs"
    return ""


def _something_to_evaluate(config: RunConfig, given: Given) -> str:
    if config.eval_steps and not (config.eval_dataset or config.val_size):
        return f"eval_steps is {config.eval_steps}, but nothing is held out; set eval_dataset or val_size"
    return ""


def _lora_options(config: RunConfig, given: Given) -> str:
    useless = [key for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target") if key in given]
    if config.finetuning_type == "full" and useless:
        return (
            f"{', '.join(useless)} set while finetuning_type is full, which has no adapters; "
            "delete that or set finetuning_type: lora"
        )
    return ""


def _lora_target(config: RunConfig, given: Given) -> str:
    targets = config.lora_target
    if not targets:
        return "lora_target is empty; allowed: all, or names of linear layers such as q_proj,v_proj"
    if "all" in targets and len(targets) > 1:
        return f"lora_target is {','.join(targets)}; `all` stands alone"
    if any(target.split(".")[-1] in ("lm_head", "embed_out") for target in targets):
        return "lora_target names the output head, whose weights stay frozen here; take it off the list"
    return ""


def _trackers(config: RunConfig, given: Given) -> str:
    missing = [name for name in config.report_to if importlib.util.find_spec(name) is None]
    if missing:
        return f"report_to names {', '.join(missing)}, not installed here; run `pip install 'dsdpo[track]'`"
    return ""


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
        return f"attn_implementation {wanted} computes in bf16, but precision is fp32; change one of them"
    return missing_flash_package(wanted)


RULES: list[tuple[tuple[str, ...], Callable[[RunConfig, Given], str]]] = [
    (("max_tokens_per_row", "max_length"), _row_fits_a_pair),
    (("loss_type",), _losses),
    (("loss_weights", "loss_type"), _loss_weights),
    (("eval_dataset", "val_size"), _one_held_out_set),
    (("val_size",), _val_size),
    (("eval_steps", "eval_dataset", "val_size"), _something_to_evaluate),
    (("finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target"), _lora_options),
    (("lora_target",), _lora_target),
    (("report_to",), _trackers),
    (("attn_implementation", "precision"), _attention),
]
