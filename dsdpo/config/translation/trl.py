"""Options of TRL's trainers and scripts, today's and earlier ones, and of the recipes of the alignment handbook."""

from __future__ import annotations

from typing import Any

from dsdpo.config.stages import STAGE_ALIASES
from dsdpo.config.translation.rules import (
    NOT_SET,
    Given,
    Meaning,
    NoEffect,
    Refused,
    Rule,
    Sets,
    each,
    is_off,
    lossless_list,
    no_effect,
    only,
    option,
    refused,
    word,
)
from dsdpo.config.translation.trainer import TRAINER_DEFAULTS, dtype
from dsdpo.config.translation.trl_data import DATA, TEST_SPLITS

# What TRL takes where nothing says otherwise, for each stage, where that is not ours and changes what is learned.
_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "rm": 1e-4}
_ADAPTER = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05}


def defaults(stage: str, given: Given) -> dict[str, Any]:
    """What TRL takes for a stage where nothing says otherwise, where our default is another."""
    found = TRAINER_DEFAULTS | {"learning_rate": _RATES.get(stage, 5e-5), "truncation_mode": "keep_start"}
    if is_off(given.get("use_peft")) and given.get("finetuning_type") != "lora":
        return found | {"finetuning_type": "full"}
    return found if given.get("adapter_name_or_path") else found | _ADAPTER


def stage_of(given: Given) -> str | None:
    """The stage whose trainer reads these options, where only one does; None where they do not tell."""
    found = {stage for stage, names in _OWN.items() if any(given.get(name) is not None for name in names)}
    losses = {word(name) for name in lossless_list(given.get("loss_type") or "")}
    if losses & {"nll", "dft", "chunked_nll"}:
        found.add("sft")
    elif losses & {"kto", "apo_zero_unpaired"}:
        found.add("kto")
    elif losses:
        found.add("dpo")
    if not found and given.get("beta") is not None:
        found.add("dpo")
    return found.pop() if len(found) == 1 else None


_OWN = {
    "sft": (
        *("assistant_only_loss", "completion_only_loss", "dataset_text_field", "packing", "packing_strategy"),
        *("eval_packing", "max_seq_length", "dataset_kwargs", "num_of_sequences", "chars_per_token", "shuffle_dataset"),
    ),
    "kto": ("desirable_weight", "undesirable_weight"),
    "rm": ("center_rewards_coefficient",),
    "dpo": (
        *("rpo_alpha", "f_divergence_type", "use_weighting", "ld_alpha", "discopop_tau", "label_smoothing"),
        *("loss_weights", "f_alpha_divergence_coef", "reference_free"),
    ),
}


def _peft(value: Any, given: Given) -> Meaning:
    if value is None:
        return NoEffect(NOT_SET)
    return Sets({"finetuning_type": "full" if is_off(value) else "lora"})


def _loss(value: Any, given: Given) -> Meaning:
    """Of SFTConfig and KTOConfig; that of DPOConfig has our names."""
    names = lossless_list(value or "")
    stage = STAGE_ALIASES.get(str(given.get("stage")), given.get("stage"))
    if value is None or names in (["nll"], ["kto"]) or (names == ["chunked_nll"]):
        return NoEffect("the stage says it")
    if stage in ("sft", "kto"):
        return Refused(f"stage {stage} has one loss, {'nll' if stage == 'sft' else 'kto'}; delete the line")
    if "rpo_alpha" in given and not is_off(given["rpo_alpha"]):
        return NoEffect("see rpo_alpha")
    return Sets({"loss_type": value})


def _rpo(value: Any, given: Given) -> Meaning:
    if is_off(value):
        return NoEffect(NOT_SET)
    losses = lossless_list(given.get("loss_type") or "sigmoid")
    return Sets({"loss_type": [*losses, "sft"], "loss_weights": [*[1.0] * len(losses), float(value)]})


def _targets(value: Any, given: Given) -> Meaning:
    if value is None or value == "":
        return NoEffect(NOT_SET)
    return Sets({"lora_target": lossless_list(value)})


def _bits(count: int) -> Rule:
    return lambda value, given: NoEffect(NOT_SET) if is_off(value) else Sets({"quantization_bit": count})


def _quantized(name: str) -> Rule:
    """How 4 bits are stored; means nothing beside other weights."""

    def rule(value: Any, given: Given) -> Meaning:
        if value is None or is_off(given.get("load_in_4bit")):
            return NoEffect("load_in_4bit is not set")
        return Sets({name: value})

    return rule


def _cached(value: Any, given: Given) -> Meaning:
    if is_off(value):
        return NoEffect("the reference's log-probs are computed once and stored; the values are the same")
    return Sets({"reference": "cached"})


def _center(value: Any, given: Given) -> Meaning:
    return NoEffect(NOT_SET) if value is None else Sets({"center_rewards_coefficient": value})


def _reference_model(value: Any, given: Given) -> Meaning:
    if value is None or value == given.get("model_name_or_path"):
        return NoEffect("the reference is the untrained model")
    return Refused("the reference is the untrained model itself; delete the line, or name that model twice")


def _template(value: Any, given: Given) -> Meaning:
    if is_off(value):
        return NoEffect(NOT_SET)
    return Sets({"template": value})


_ASSISTANT = "stage sft trains on the replies, or the completion, alone"
_REFERENCE = "the reference stays the untrained model"

# Rules for names that are ours, too.
SHARED: dict[str, Rule] = {"loss_type": _loss, "center_rewards_coefficient": _center}

TRL: dict[str, Rule] = {
    **DATA,
    "use_peft": _peft,
    "use_lora": _peft,
    "lora_r": option("lora_rank"),
    "lora_target_modules": _targets,
    "lora_task_type": no_effect("the stage says it"),
    **each(refused("the whole of a layer is not trained beside an adapter; delete the line"), "lora_modules_to_save"),
    **each(
        refused("only plain LoRA is supported; delete the line"),
        "use_rslora use_dora lora_target_parameters lora_init_lora_weights",
    ),
    "load_in_4bit": _bits(4),
    "load_in_8bit": _bits(8),
    "bnb_4bit_quant_type": _quantized("quantization_type"),
    "use_bnb_nested_quant": _quantized("double_quantization"),
    "bnb_4bit_quant_storage": no_effect("it follows from precision and the ZeRO stage"),
    "dtype": dtype,
    "torch_dtype": dtype,
    "trust_remote_code": no_effect("no code of a model's folder is run; docs/formats.md lists the families"),
    "model_init_kwargs": refused("write its keys as options of their own: precision, attn_implementation"),
    "model_revision": option("model_revision"),
    "model_code_revision": refused("no code of a model's folder is run; delete the line"),
    "use_flash_attention_2": lambda value, given: (
        NoEffect(NOT_SET) if is_off(value) else Sets({"attn_implementation": "flash_attention_2"})
    ),
    "router_aux_loss_coef": refused("a router has no loss of its own here; delete the line"),
    "chat_template_path": _template,
    "chat_template": _template,
    "eos_token": no_effect("the chat template says how a reply ends"),
    "pad_token": no_effect("rows are packed, so nothing is padded"),
    **each(
        no_effect("rows are packed, and no example sees another"),
        "packing packing_strategy padding_free pad_to_multiple_of eval_packing max_packed_length num_of_sequences "
        "chars_per_token padding_value label_pad_token_id padding_free_max_length use_logits_to_keep",
    ),
    "max_seq_length": option("max_length"),
    "max_prompt_length": no_effect(
        "max_length counts prompt and completion together; truncation_mode says what is cut"
    ),
    "max_completion_length": no_effect(
        "max_length counts prompt and completion together; truncation_mode says what is cut"
    ),
    "max_target_length": no_effect("max_length counts prompt and completion together"),
    "assistant_only_loss": only("true", why=_ASSISTANT, remedy=f"{_ASSISTANT}: write true, or set stage: pt for texts"),
    "completion_only_loss": only(
        "true", why=_ASSISTANT, remedy=f"{_ASSISTANT}: write true, or set stage: pt for texts"
    ),
    "rpo_alpha": _rpo,
    "dpo_alpha": _rpo,
    "discopop_temperature": option("discopop_tau"),
    "f_divergence": option("f_divergence_type"),
    "precompute_ref_log_probs": _cached,
    "precompute_ref_batch_size": no_effect("rows are filled by tokens: max_tokens_per_row"),
    "reference_free": refused("set loss_type: simpo, cpo or orpo, which have no reference"),
    "sync_ref_model": refused(f"{_REFERENCE}; delete the line"),
    **each(no_effect(_REFERENCE), "ref_model_mixup_alpha ref_model_sync_steps"),
    **each(_reference_model, "ref_model ref_model_name_or_path"),
    **each(refused("set adapter_name_or_path, which is also the reference"), "ref_model_adapters ref_adapter_name"),
    **each(no_effect(_REFERENCE), "model_adapter_name force_use_ref_model ref_model_revision ref_model_init_kwargs"),
    **each(no_effect("`dsdpo chat` shows answers"), "generate_during_eval num_completions max_new_tokens"),
    "tools": refused("tools stand in the records; delete the line"),
    "is_encoder_decoder": refused("only decoders are supported; delete the line"),
    "activation_offloading": no_effect("it is about memory alone: see gradient_checkpointing"),
    "ignore_bias_buffers": no_effect("models are sharded by DeepSpeed"),
    "log_completions": no_effect("`dsdpo chat` shows answers"),
    "wandb_entity": refused("set WANDB_ENTITY where the command is started"),
    "wandb_project": refused("set WANDB_PROJECT where the command is started"),
    "wandb_run_group": refused("set WANDB_RUN_GROUP where the command is started"),
    "benchmarks": no_effect("nothing is run after the training"),
    "callbacks": no_effect("nothing is run after the training"),
    "env": refused("set variables where the command is started; delete the block"),
    "output_router_logits": refused("a router has no loss of its own here; delete the line"),
}

# By these, options are TRL's, and not LLaMA-Factory's.
SIGNS = frozenset(TRL) - {"tools", "env", "ref_model", "ref_model_adapters", "packing", "trust_remote_code", "use_dora"}
SIGNS -= {"model_revision", "use_rslora", *TEST_SPLITS}
