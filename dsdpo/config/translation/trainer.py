"""Options of transformers' TrainingArguments, which TRL and LLaMA-Factory share; older names, too."""

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
    no_effect,
    number,
    only,
    option,
    refused,
    word,
)

# AdamW, whatever fuses or pages it; their 8-bit relatives round the moments.
_ADAMW = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
    *("adamw_hf", "adamw_apex_fused", "paged_adamw", "paged_adamw_32bit"),
)
_TORCH_NAMES = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "half": "fp16", "fp16": "fp16"}
_TORCH_NAMES |= {"float32": "fp32", "float": "fp32", "fp32": "fp32", "auto": "auto"}
PACKED = "rows are packed, and no example sees another"
BATCH_OF_EXAMPLES = "a step counts examples, there packed rows of max_length tokens"
_BY_STEPS = "checkpoints and evaluations are counted in steps"

_PARTS = "prompt and completion are not cut to lengths of their own, only together to max_length"
_LENGTHS = ("max_prompt_length", "max_completion_length", "max_source_length", "max_target_length")


def uncut(given: Given) -> dict[str, str]:
    """Lengths of a part, which count for nothing here: option -> in words."""
    return {name: _PARTS for name in _LENGTHS if not is_off(given.get(name))}


# Their defaults, where ours differ and change what is learned.
TRAINER_DEFAULTS: dict[str, Any] = {"learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear"}
PER_DEVICE = 8  # per_device_train_batch_size


def dtype(value: Any, given: Given) -> Meaning:
    """Of the weights in memory. Beside `bf16` or `fp16` it is of the master copy, which is in fp32 here."""
    if value is None or any(not is_off(given.get(name)) for name in ("bf16", "fp16", "pure_bf16")):
        return NoEffect("precision says what is computed with; gradients and the optimizer are in fp32")
    name = word(value).removeprefix("torch.")
    if name not in _TORCH_NAMES:
        return Refused("set precision: bf16, fp16 or fp32")
    return Sets({"precision": _TORCH_NAMES[name]})


def _warmup_steps(value: Any, given: Given) -> Meaning:
    """Below 1 it is a share of all steps."""
    count = number(value)
    if count is not None and 0 < count < 1:
        return Sets({"warmup_ratio": count})
    return Sets({"warmup_steps": value if count is None or count != int(count) else int(count)})


def _not_beside_constant(rule: Rule) -> Rule:
    """A warm-up, which the schedule `constant` has here and not there."""

    def checked(value: Any, given: Given) -> Meaning:
        if word(given.get("lr_scheduler_type")) == "constant" and not is_off(value):
            return Refused("constant has no warm-up there: write constant_with_warmup, or delete the line")
        return rule(value, given)

    return checked


def _max_steps(value: Any, given: Given) -> Meaning:
    """0 and below: by epochs."""
    count = number(value)
    return NoEffect("num_train_epochs decides") if count is not None and count <= 0 else Sets({"max_steps": value})


def _schedule(value: Any, given: Given) -> Meaning:
    return Sets({"lr_scheduler_type": "constant" if word(value) == "constant_with_warmup" else value})


def _when(name: str) -> Rule:
    """`save_strategy` and `eval_strategy`."""

    def rule(value: Any, given: Given) -> Meaning:
        text = word(value)
        if text in ("steps", "none"):
            return NoEffect(f"{name} decides")
        if text in ("false", "no"):
            return Sets({name: None})
        if text == "epoch" and name == "eval_steps":
            return Sets({name: None})  # once, at the end
        if text == "epoch":
            return NoEffect(f"{name} decides, and there is a checkpoint at the end; {_BY_STEPS}")
        return Refused(f"set {name}; {_BY_STEPS}")

    return rule


def _steps(name: str) -> Rule:
    """Below 1 it would be a share of all steps; without the strategy `steps` it means nothing."""

    def rule(value: Any, given: Given) -> Meaning:
        strategy = given.get(f"{name.removesuffix('_steps')}_strategy")
        if name == "eval_steps":
            strategy = strategy or given.get("evaluation_strategy")
            if strategy is None and is_off(given.get("eval_dataset")) and is_off(given.get("val_size")):
                return NoEffect("nothing is held out")
        if strategy is not None and word(strategy) != "steps":
            return NoEffect(f"{name.removesuffix('_steps')}_strategy is {word(strategy)}")
        count = number(value)
        if count is not None and 0 < count < 1:
            return Refused(f"give a number of steps: a share of all of them ({value}) is not supported")
        return Sets({name: None if count is not None and count <= 0 else value})

    return rule


def _logging_steps(value: Any, given: Given) -> Meaning:
    """Below 1 it is a share of all steps."""
    count = number(value)
    if count is not None and count < 1:
        return NoEffect("the metrics in output_dir have every step")
    return Sets({"logging_steps": value})


def _save_total_limit(value: Any, given: Given) -> Meaning:
    """0 and below: all."""
    count = number(value)
    return Sets({"save_total_limit": None if count is not None and count <= 0 else value})


def _attention(value: Any, given: Given) -> Meaning:
    """Other kernels that compute the same."""
    name = str(value).removeprefix("kernels-community/").replace("-", "_")
    if value is None:
        return NoEffect(NOT_SET)
    if name == "eager":
        return Sets({"attn_implementation": "sdpa"})
    if "flash_attn" in name:
        return Sets({"attn_implementation": f"flash_attention_{'3' if name.endswith('3') else '2'}"})
    return Sets({"attn_implementation": value})


def _resume(value: Any, given: Given) -> Meaning:
    if value is None or word(value) in ("true", "false", ""):
        return NoEffect("a run goes on from the newest checkpoint in output_dir; --fresh begins again")
    return Sets({"resume_from_checkpoint": value})


def _data_seed(value: Any, given: Given) -> Meaning:
    if value is None or str(value) == str(given.get("seed", 42)):
        return NoEffect("seed orders the data")
    return Refused("set seed, which orders the data, too")


def _sampling(value: Any, given: Given) -> Meaning:
    """TRL's kto reads in the order of the files, since it pairs neighbours for the KL term."""
    if value is None or word(value) in ("random", "group_by_length") or given.get("stage") == "kto":
        return NoEffect("seed orders the data")
    return Refused("seed orders the data anew in every epoch: write random")


def _optim(value: Any, given: Given) -> Meaning:
    if word(value) in (*_ADAMW, "none"):
        return NoEffect("the optimizer is AdamW, fused where the device has that")
    return Refused("the optimizer is AdamW: delete the line, or write adamw_torch")


_ELSEWHERE = "it is about speed alone"
LIGER_BY_ITSELF = "kernels: auto takes Liger's kernels wherever they run"
_UPLOAD = "push_to_hub uploads the weights at the end, to the newest revision"


def _hub_strategy(value: Any, given: Given) -> Meaning:
    if is_off(given.get("push_to_hub")) or word(value) in ("end", "every_save", "none"):
        return NoEffect(_UPLOAD)
    return Refused("checkpoints are not uploaded, the weights are at the end: write end")


def _hub_token(value: Any, given: Given) -> Meaning:
    if is_off(given.get("push_to_hub")) or is_off(value):
        return NoEffect(NOT_SET)
    return Refused("set HF_TOKEN where the command is started, and delete the line")


# Rules for names that are ours, too, and say something else or more there.
SHARED: dict[str, Rule] = {
    "max_steps": _max_steps,
    "warmup_steps": _warmup_steps,
    "logging_steps": _logging_steps,
    "save_total_limit": _save_total_limit,
    "attn_implementation": _attention,
    "lr_scheduler_type": _schedule,
    "save_steps": _steps("save_steps"),
    "eval_steps": _steps("eval_steps"),
    "resume_from_checkpoint": _resume,
    "gradient_checkpointing": lambda value, given: (
        NoEffect(NOT_SET) if value is None else Sets({"gradient_checkpointing": value})
    ),
}

# More of them, where every option is another trainer's.
OWN: dict[str, Rule] = {
    "cache_dir": no_effect("it is for downloads, which go to HF_HUB_CACHE; prepared data is beside output_dir"),
    "warmup_steps": _not_beside_constant(_warmup_steps),
    "warmup_ratio": _not_beside_constant(option("warmup_ratio")),
}

TRAINER: dict[str, Rule] = {
    "bf16": flag("precision", "bf16"),
    "fp16": flag("precision", "fp16"),
    "pure_bf16": flag("precision", "bf16"),
    "optim": _optim,
    "data_seed": _data_seed,
    "save_strategy": _when("save_steps"),
    "eval_strategy": _when("eval_steps"),
    "evaluation_strategy": _when("eval_steps"),
    "adam_eps": option("adam_epsilon"),
    "max_norm": option("max_grad_norm"),
    "gradient_clipping": option("max_grad_norm"),
    **each(no_effect("the command says it"), "do_train"),
    **each(no_effect("eval_dataset and val_size say it"), "do_eval eval_on_start eval_delay"),
    **each(refused("`dsdpo chat` and `dsdpo eval` come after the training; delete the line"), "do_predict"),
    **each(
        no_effect("rows are filled by tokens: max_tokens_per_row"),
        "per_device_eval_batch_size eval_accumulation_steps auto_find_batch_size group_by_length "
        "length_column_name batch_eval_metrics eval_do_concat_batches eval_use_gather_object prediction_loss_only "
        "include_for_metrics include_inputs_for_metrics",
    ),
    **each(
        no_effect("a run goes on from its checkpoints; --fresh begins again"),
        "overwrite_output_dir ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint",
    ),
    **each(no_effect("checkpoints hold what a run needs to go on"), "save_only_model save_safetensors"),
    **each(
        no_effect("the metrics in output_dir have every step"),
        "logging_dir logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica "
        "log_on_each_node include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics debug "
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    **each(
        no_effect("the loader reads prepared shards"),
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns dataloader_drop_last",
    ),
    **each(
        no_effect("the launcher and DeepSpeed decide it"),
        "ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters "
        "ddp_static_graph save_on_each_node local_rank",
    ),
    **each(
        no_effect(_ELSEWHERE),
        "tf32 torch_compile_backend torch_compile_mode liger_kernel_config use_cache torch_empty_cache_steps "
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs jit_mode_eval",
    ),
    "torch_compile": flag("kernels", on="compile"),
    "use_liger_kernel": no_effect(LIGER_BY_ITSELF),
    **each(
        no_effect(_UPLOAD),
        "hub_always_push hub_revision push_to_hub_organization hub_model_revision",
    ),
    "hub_strategy": _hub_strategy,
    "push_to_hub_model_id": option("hub_model_id"),
    **each(_hub_token, "hub_token push_to_hub_token"),
    "average_tokens_across_devices": only(
        "true",
        why="losses are averaged over the whole step",
        remedy="losses are averaged over the whole step: write true",
    ),
    "activation_checkpointing": option("gradient_checkpointing"),
    "train_sampling_strategy": _sampling,
    "metric_for_best_model": no_effect("the last weights are exported"),
    "greater_is_better": no_effect("the last weights are exported"),
    "load_best_model_at_end": refused(
        "the last weights are exported; `dsdpo export --step` takes an earlier checkpoint"
    ),
    **each(
        refused("the optimizer is AdamW, for every trained parameter; delete the line"),
        "optim_args optim_target_modules",
    ),
    "label_smoothing_factor": refused("delete the line: only preference losses have label_smoothing"),
    **each(no_effect("evaluation computes as the training does"), "bf16_full_eval fp16_full_eval sortish_sampler"),
    "full_determinism": option("deterministic"),
    "use_cpu": refused("set DS_ACCELERATOR=cpu where the command is started"),
    "no_cuda": refused("set DS_ACCELERATOR=cpu where the command is started"),
    **each(
        refused("ranks run DeepSpeed: set deepspeed: zero3, or delete the line"),
        "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap accelerator_config parallelism_config",
    ),
    "fp8": refused("set precision: bf16"),
    **each(no_effect("it belongs to fp8"), "fp8_backend fp8_enable_fsdp_float8_all_gather"),
    "label_names": refused("the columns of the data are told by dataset_info.json; delete the line"),
}
