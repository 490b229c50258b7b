"""Options of TRL's trainers and scripts, today's and earlier ones, and of the recipes of the alignment handbook."""

from __future__ import annotations

from typing import Any

from dsdpo.config.translation.rules import (
    NOT_SET,
    Given,
    Meaning,
    NoEffect,
    Refused,
    Rule,
    Sets,
    each,
    flag,
    is_off,
    lossless_list,
    no_effect,
    only,
    option,
    refused,
    word,
)
from dsdpo.config.translation.trainer import BATCH_OF_EXAMPLES, PACKED, TRAINER_DEFAULTS, dtype, uncut
from dsdpo.config.translation.trl_data import DATA, shares

# What TRL takes where nothing says otherwise, for each stage, where that is not ours and changes what is learned.
_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "rm": 1e-4}
# The modules are PEFT's choice for Llama, Qwen, Gemma, Mistral and their like.
_ADAPTER = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target": ["q_proj", "v_proj"]}
_TRUNCATION = {"rm": "refuse"}


def defaults(stage: str, given: Given) -> dict[str, Any]:
    """What TRL takes for a stage where nothing says otherwise, where our default is another."""
    found = TRAINER_DEFAULTS | {"learning_rate": _RATES.get(stage, 5e-5)}
    found["truncation_mode"] = _TRUNCATION.get(stage, "keep_start")
    if stage == "sft":
        found["disable_dropout"] = False
    if not is_off(given.get("load_in_4bit")):
        found["double_quantization"] = False
    if is_off(given.get("use_peft", given.get("use_lora"))) and given.get("finetuning_type") != "lora":
        return found | {"finetuning_type": "full"}
    return found if given.get("adapter_name_or_path") else found | _ADAPTER


def differs(stage: str, given: Given) -> dict[str, str]:
    """What a run does otherwise than TRL would: its option -> in words."""
    found = uncut(given)
    mixture = given.get("dataset_mixture")
    if isinstance(mixture, dict) and any(share < 1.0 for share in shares(mixture)):
        found["dataset_mixture"] = "of a set with a weight below 1 the first examples are taken, there drawn ones"
    if stage == "sft" and not is_off(given.get("packing")):
        found["packing"] = BATCH_OF_EXAMPLES
    if stage == "sft" and all(given.get(name) is None for name in ("assistant_only_loss", "completion_only_loss")):
        found["assistant_only_loss"] = f"{_ASSISTANT}, TRL by default on all of a dialogue in messages"
    return found


def stage_of(given: Given) -> str | None:
    """The stage whose trainer reads these options, where only one does; None where they do not tell.

    `beta` alone does not: in an earlier recipe it may be that of ORPOTrainer, whose data is the same.
    """
    found = {stage for stage, names in _OWN.items() if any(given.get(name) is not None for name in names)}
    losses = {word(name) for name in lossless_list(given.get("loss_type") or "")}
    if losses & {"nll", "dft", "chunked_nll"}:
        found.add("sft")
    elif losses & {"kto", "apo_zero_unpaired"}:
        found.add("kto")
    elif losses:
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


def _loss(value: Any, given: Given) -> Meaning:
    """Of SFTConfig and KTOConfig; that of DPOConfig has our names."""
    names = lossless_list(value or "")
    stage = given["stage"]
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
    return Sets({"loss_type": [*losses, "sft"], "loss_weights": [*[1.0] * len(losses), value]})


def _targets(value: Any, given: Given) -> Meaning:
    if value is None or value == "":
        return NoEffect(NOT_SET)
    return Sets({"lora_target": lossless_list(value)})


def _to_save(value: Any, given: Given) -> Meaning:
    if given["stage"] == "rm" and lossless_list(value or "") == ["score"]:
        return NoEffect("the head is trained whole")
    return NoEffect(NOT_SET) if is_off(value) else Refused(_WHOLE)


def _half(value: Any, given: Given) -> Meaning:
    """Without it, and without fp16, TRL takes bf16; switched off, the type of the weights decides."""
    if not is_off(value):
        return flag("precision", "bf16")(value, given)
    weights = [given.get(name) for name in ("dtype", "torch_dtype") if given.get(name) is not None]
    if value is None or weights or not is_off(given.get("fp16")):
        return NoEffect(NOT_SET)
    return Sets({"precision": "fp32"})


def _wandb(name: str) -> Rule:
    def rule(value: Any, given: Given) -> Meaning:
        if is_off(value) or "wandb" not in lossless_list(given.get("report_to") or ""):
            return NoEffect("report_to does not name wandb")
        return Refused(f"set {name} where the command is started")

    return rule


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


_WHOLE = "the whole of a layer is not trained beside an adapter; delete the line"
_ASSISTANT = "stage sft trains on the replies, or the completion, alone"
_REFERENCE = "the reference stays the untrained model"

# Rules for names that are ours, too.
SHARED: dict[str, Rule] = {"loss_type": _loss, "center_rewards_coefficient": _center}

TRL: dict[str, Rule] = {
    **DATA,
    "use_peft": flag("finetuning_type", "lora", off="full"),
    "use_lora": flag("finetuning_type", "lora", off="full"),
    "lora_r": option("lora_rank"),
    "lora_target_modules": _targets,
    "lora_task_type": no_effect("the stage says it"),
    "lora_modules_to_save": _to_save,
    "bf16": _half,
    **each(
        refused("only plain LoRA is supported; delete the line"),
        "use_rslora use_dora lora_target_parameters",
    ),
    "lora_init_lora_weights": only("true", why="it is PEFT's own way", remedy="only PEFT's own way is: write true"),
    "load_in_4bit": flag("quantization_bit", 4),
    "load_in_8bit": flag("quantization_bit", 8),
    "bnb_4bit_quant_type": _quantized("quantization_type"),
    "use_bnb_nested_quant": _quantized("double_quantization"),
    "bnb_4bit_quant_storage": no_effect("it follows from precision and the ZeRO stage"),
    "dtype": dtype,
    "torch_dtype": dtype,
    "trust_remote_code": no_effect("no code of a model's folder is run; docs/formats.md lists the families"),
    "model_init_kwargs": refused("write its keys as options of their own: precision, attn_implementation"),
    "model_code_revision": refused("no code of a model's folder is run; delete the line"),
    "use_flash_attention_2": flag("attn_implementation", "flash_attention_2"),
    "router_aux_loss_coef": refused("a router has no loss of its own here; delete the line"),
    "chat_template_path": _template,
    "chat_template": _template,
    "eos_token": no_effect("the chat template says how a reply ends"),
    "pad_token": no_effect("rows are packed, so nothing is padded"),
    **each(
        no_effect(PACKED),
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
    "wandb_entity": _wandb("WANDB_ENTITY"),
    "wandb_project": _wandb("WANDB_PROJECT"),
    "wandb_run_group": _wandb("WANDB_RUN_GROUP"),
    "benchmarks": no_effect("nothing is run after the training"),
    "callbacks": no_effect("nothing is run after the training"),
    "env": refused("set variables where the command is started; delete the block"),
    "output_router_logits": refused("a router has no loss of its own here; delete the line"),
}

# By these, options are TRL's, and not LLaMA-Factory's.
SIGNS = frozenset(TRL) - {"tools", "env", "bf16", "dataset_test_split"}
