"""Options of other trainers that we name otherwise or do not have, with what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_BATCH = (
    "set train_batch_size (pairs per optimizer step over all GPUs) and max_tokens_per_row (what one GPU "
    "computes at a time); the number of accumulation steps follows"
)
_PRECISION = "set precision: bf16, fp32 or auto"
_LAUNCH = "it is an argument of `dsdpo train` (--num_accelerators, --hostfile, ...), not of the run config"

ELSEWHERE = {
    "per_device_train_batch_size": _BATCH,
    "per_device_eval_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "micro_train_batch_size": _BATCH,
    "auto_find_batch_size": _BATCH,
    "pref_beta": "set beta",
    "dpo_beta": "set beta",
    "pref_loss": "set loss_type",
    "dpo_loss": "set loss_type",
    "pref_ftx": "set loss_type: [sigmoid, sft] and loss_weights: [1.0, <pref_ftx>]",
    "dpo_ftx": "set loss_type: [sigmoid, sft] and loss_weights: [1.0, <dpo_ftx>]",
    "rpo_alpha": "set loss_type: [sigmoid, sft] and loss_weights: [1.0, <rpo_alpha>]",
    "ftx_gamma": "set loss_type: [sigmoid, sft] and loss_weights: [1.0, <ftx_gamma>]",
    "dpo_label_smoothing": "set label_smoothing",
    "label_smoothing_factor": "set label_smoothing (of the DPO loss)",
    "cutoff_len": "set max_length",
    "max_seq_length": "set max_length",
    "model_max_length": "set max_length",
    "max_len": "set max_length",
    "max_prompt_length": "set max_length, which counts prompt and completion together, and truncation_mode",
    "max_completion_length": "set max_length, which counts prompt and completion together",
    "model_name": "set model_name_or_path",
    "pretrain": "set model_name_or_path",
    "base_model": "set model_name_or_path",
    "ref_model": "the reference is the untrained policy itself; delete the line",
    "ref_model_name_or_path": "the reference is the untrained policy itself; delete the line",
    "precompute_ref_log_probs": "set reference: cached (the default) or live",
    "precompute_ref_batch_size": "delete the line; rows of max_tokens_per_row are used",
    "sync_ref_model": "the reference stays the untrained policy (no TR-DPO); delete the line",
    "ref_model_mixup_alpha": "the reference stays the untrained policy (no TR-DPO); delete the line",
    "ref_model_sync_steps": "the reference stays the untrained policy (no TR-DPO); delete the line",
    "ref_model_adapters": "set adapter_name_or_path, which is also the reference",
    "reference_free": "set loss_type to simpo, cpo or orpo",
    "discopop_temperature": "set discopop_tau",
    "f_divergence": "set f_divergence_type",
    "kto_chosen_weight": "set desirable_weight",
    "kto_rejected_weight": "set undesirable_weight",
    "completion_only_loss": "stage sft trains on the completion alone; delete the line",
    "assistant_only_loss": "stage sft trains on the assistant's words alone; delete the line",
    "train_on_inputs": "stage sft trains on the assistant's words alone; delete the line",
    "train_on_prompt": "stage sft trains on the assistant's words alone; delete the line",
    "lambda_orpo": "set loss_type: orpo and beta",
    "bf16": _PRECISION,
    "fp16": f"{_PRECISION}; fp16 is not supported",
    "pure_bf16": _PRECISION,
    "torch_dtype": _PRECISION,
    "dtype": _PRECISION,
    "tf32": "set torch's own environment variable for it; delete the line",
    "do_train": "the command says so (`dsdpo train`); delete the line",
    "do_eval": "evaluation follows eval_dataset or val_size; delete the line",
    "do_predict": "use `dsdpo chat`; delete the line",
    "eval_strategy": "set eval_steps, or leave it empty for one evaluation at the end",
    "evaluation_strategy": "set eval_steps, or leave it empty for one evaluation at the end",
    "save_strategy": "set save_steps; empty makes no checkpoints but when the run is stopped",
    "logging_strategy": "set logging_steps",
    "logging_dir": "metrics are written to output_dir; delete the line",
    "overwrite_output_dir": "add --fresh to `dsdpo train` to begin again",
    "save_only_model": "checkpoints hold what a run needs to go on; `dsdpo export --step` makes weights of one",
    "ignore_data_skip": "the order of the data is sought, not replayed; delete the line",
    "overwrite_cache": "prepared data is found by its content; delete the line",
    "use_peft": "set finetuning_type: lora or full",
    "use_lora": "set finetuning_type: lora or full",
    "lora_r": "set lora_rank",
    "r": "set lora_rank",
    "lora_target_modules": "set lora_target",
    "target_modules": "set lora_target",
    "dataset_name": "set dataset",
    "train_file": "set dataset",
    "dataset_num_proc": "set preprocessing_num_workers",
    "chat_template": "set template",
    "system_prompt": "set default_system",
    "flash_attn": "set attn_implementation",
    "use_flash_attention_2": "set attn_implementation: flash_attention_2",
    "packing": "examples are always packed; see max_tokens_per_row",
    "padding_free": "pairs are always packed; see max_tokens_per_row",
    "lr": "set learning_rate",
    "lr_scheduler": "set lr_scheduler_type",
    "epochs": "set num_train_epochs",
    "num_epochs": "set num_train_epochs",
    "adam_eps": "set adam_epsilon",
    "optim": "the optimizer is AdamW; delete the line",
    "gradient_clipping": "set max_grad_norm",
    "max_norm": "set max_grad_norm",
    "disable_gradient_checkpointing": "set gradient_checkpointing",
    "gradient_checkpointing_kwargs": "set gradient_checkpointing: true or false",
    "deepspeed_config": "set deepspeed",
    "zero_stage": "set deepspeed: ds_configs/zero3.json (or zero1, zero2)",
    "quantization_bit": "quantized weights are not supported; delete the line",
    "load_in_4bit": "quantized weights are not supported; delete the line",
    "load_in_8bit": "quantized weights are not supported; delete the line",
    "ddp_timeout": "delete the line",
    "remove_unused_columns": "delete the line",
    "num_processes": _LAUNCH,
    "num_accelerators": _LAUNCH,
    "num_gpus": _LAUNCH,
    "num_nodes": _LAUNCH,
    "hostfile": _LAUNCH,
    "master_port": _LAUNCH,
}


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an unknown-key message: what to write instead, or where to look."""
    key = name.replace("-", "_")
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    close = did_you_mean(key, known)
    return close or "`dsdpo train --help` lists every option"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean x?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""
