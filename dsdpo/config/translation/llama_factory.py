"""Options of LLaMA-Factory, today's and earlier ones."""

from __future__ import annotations

from typing import Any

from dsdpo.config.translation.llama_factory_data import DATA, SYSTEMS, adapters, template
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
    option,
    refused,
    word,
)
from dsdpo.config.translation.trainer import BATCH_OF_EXAMPLES, LIGER_BY_ITSELF, TRAINER_DEFAULTS, uncut

_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
_ATTENTION = {
    "auto": "auto",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "disabled": "sdpa",
}
# What is cut is counted. keep_end, our default, keeps answers whole.
_CUT = "an example beyond it loses the prompt's oldest tokens (truncation_mode), there prompt and answer in proportion"


def defaults(stage: str, given: Given) -> dict[str, Any]:
    """What LLaMA-Factory takes where nothing says otherwise, where our default is another."""
    found = TRAINER_DEFAULTS | {"max_length": 2048}
    if system := SYSTEMS.get(str(given.get("template"))):
        found["default_system"] = system
    return found | {"disable_dropout": False} if stage in ("pt", "sft", "rm") else found


def differs(stage: str, given: Given) -> dict[str, str]:
    """What a run does otherwise than LLaMA-Factory would: its option -> in words."""
    found = uncut(given)
    packs = not is_off(given.get("packing")) or not is_off(given.get("neat_packing"))
    if stage == "sft" and packs:
        found["packing"] = BATCH_OF_EXAMPLES
    if stage == "pt":
        found["packing"] = "a step counts chunks of at most max_length tokens, each of one text"
    elif given.get("truncation_mode") is None:
        found["cutoff_len"] = _CUT
    has_reference = stage == "kto" or (stage == "dpo" and _loss_name(given) not in ("orpo", "simpo"))
    if has_reference and given.get("adapter_name_or_path") and is_off(given.get("create_new_adapter")):
        found["adapter_name_or_path"] = "the reference is the model with this adapter, there the model without it"
    return found


def stage_of(given: Given) -> str | None:
    """None: its default is sft, ours dpo, so that a run must say which it wants."""
    return None


def _beta(value: Any, given: Given) -> Meaning:
    if value is None or given["stage"] not in ("dpo", "kto"):
        return NoEffect(f"stage {given['stage']} has no reference")
    return Sets({"beta": value})


def _loss_name(given: Given) -> str:
    return word(given.get("pref_loss", given.get("dpo_loss")) or "sigmoid")


def _loss(value: Any, given: Given) -> Meaning:
    """`pref_loss` and `pref_ftx` together: the likelihood of the chosen answer is a second loss."""
    stage = given["stage"]
    share = given.get("pref_ftx", given.get("dpo_ftx", given.get("ftx_gamma")))
    if stage == "kto" and value == share and not is_off(share):
        return Refused("stage kto has no second loss; delete the line")
    if stage != "dpo":
        return NoEffect(f"stage {stage} does not read it")
    name = _loss_name(given)
    if name not in _LOSSES:
        return Refused(f"pref_loss is {name}; allowed: {', '.join(_LOSSES)}, or set loss_type")
    if is_off(share):
        return Sets({"loss_type": [_LOSSES[name]]})
    return Sets({"loss_type": [_LOSSES[name], "sft"], "loss_weights": [1.0, share]})


def _smoothing(value: Any, given: Given) -> Meaning:
    if is_off(value) or given["stage"] != "dpo":
        return NoEffect(NOT_SET)
    return Sets({"label_smoothing": value})


def _of_stage(stage: str, name: str) -> Rule:
    def rule(value: Any, given: Given) -> Meaning:
        if value is None or given["stage"] != stage:
            return NoEffect(f"stage {stage} reads it")
        return Sets({name: value})

    return rule


def _attention(value: Any, given: Given) -> Meaning:
    if value is None:
        return NoEffect(NOT_SET)
    name = word(value)
    name = {"true": "fa2", "false": "disabled", "off": "disabled"}.get(name, name)
    if name not in _ATTENTION:
        return Refused("set attn_implementation")
    return Sets({"attn_implementation": _ATTENTION[name]})


def _reference(value: Any, given: Given) -> Meaning:
    if value is None or value == given.get("model_name_or_path"):
        return NoEffect("the reference is the untrained model")
    return Refused("the reference is the untrained model itself; delete the line, or name that model twice")


def _method(value: Any, given: Given) -> Meaning:
    if value is None or word(value) in ("bnb", "bitsandbytes"):
        return NoEffect("weights are quantized by bitsandbytes")
    return Refused("weights are quantized by bitsandbytes: write bnb")


_OTHER_OPTIMIZER = refused("the optimizer is AdamW; delete the line")
_PLAIN_LORA = refused("only plain LoRA is supported; delete the line")
_FREEZE = no_effect("finetuning_type freeze is not supported, and says so")
_TEXT_ONLY = no_effect("only texts are trained on; a set with images ends the preparation")
_OF_ANOTHER = "it belongs to an option that is not supported"
_TOKENS = refused("the vocabulary stays as it is; add tokens to the model before, and delete the line")

LLAMA_FACTORY: dict[str, Rule] = {
    # method
    "pref_beta": _beta,
    "dpo_beta": _beta,
    **each(_loss, "pref_loss dpo_loss pref_ftx dpo_ftx ftx_gamma"),
    "pref_bco_weight": refused("set loss_type: [sigmoid, bco_pair] and loss_weights"),
    "dpo_label_smoothing": _smoothing,
    "kto_chosen_weight": _of_stage("kto", "desirable_weight"),
    "kto_rejected_weight": _of_stage("kto", "undesirable_weight"),
    **each(_reference, "ref_model"),
    **each(refused("set adapter_name_or_path, which is also the reference"), "ref_model_adapters"),
    "ref_model_quantization_bit": refused("the reference has the weights of the policy: set quantization_bit"),
    "additional_target": refused("the whole of a layer is not trained beside an adapter; delete the line"),
    **each(_PLAIN_LORA, "use_rslora use_dora pissa_init pissa_convert loraplus_lr_ratio oft_rank module_dropout"),
    **each(no_effect(_OF_ANOTHER), "pissa_iter loraplus_lr_embedding oft_block_size hyper_parallel_cp_size"),
    **each(
        no_effect(_OF_ANOTHER),
        "kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts "
        "kt_lora_expert_num kt_lora_expert_intermediate_size kt_config",
    ),
    "oft_target": no_effect("finetuning_type oft is not supported, and says so"),
    **each(_FREEZE, "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules num_layer_trainable"),
    "name_module_trainable": _FREEZE,
    **each(_OTHER_OPTIMIZER, "use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro"),
    **each(
        no_effect("it belongs to an optimizer that is not supported"),
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise "
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
        "apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode "
        "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose",
    ),
    **each(
        refused("the loss of stage sft is the likelihood of the replies; delete the line"),
        "use_dft_loss use_asft_loss use_eaft_loss",
    ),
    **each(no_effect("it belongs to a loss that is not supported"), "asft_alpha eaft_alpha"),
    **each(
        refused("ranks run DeepSpeed; delete the line"),
        "use_mca use_megatron_bridge megatron_bridge_args use_hyper_parallel hyper_parallel_args use_kt use_ray",
    ),
    **each(
        no_effect("it belongs to a stage that is not supported"), "reward_model reward_model_type reward_model_adapters"
    ),
    **each(
        no_effect("it belongs to a stage that is not supported"),
        "reward_model_quantization_bit ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards "
        "ppo_logger",
    ),
    "compute_accuracy": no_effect("evaluation gives loss, perplexity or accuracy"),
    "disable_shuffling": refused("seed orders the data anew in every epoch; delete the line"),
    "early_stopping_steps": refused("training goes to its end; delete the line"),
    "include_effective_tokens_per_second": no_effect("the metrics of a step have it"),
    "use_swanlab": refused("set report_to: swanlab, and SWANLAB_PROJECT where the command is started"),
    **each(
        no_effect("it belongs to use_swanlab"),
        "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
    ),
    **each(
        _TEXT_ONLY,
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model media_dir train_mm_proj_only",
    ),
    **each(
        _TEXT_ONLY,
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate visual_inputs "
        "image_resolution video_resolution",
    ),
    # model
    "adapter_folder": no_effect("adapter_name_or_path names the folder"),
    "use_fast_tokenizer": no_effect("the tokenizer is transformers' own for the model"),
    "split_special_tokens": refused("special tokens in texts are told by the data; delete the line"),
    **each(_TOKENS, "resize_vocab add_tokens add_special_tokens new_special_tokens new_special_tokens_config"),
    "init_special_tokens": no_effect("the vocabulary stays as it is"),
    "low_cpu_mem_usage": no_effect("weights are read tensor by tensor"),
    **each(
        refused("a model is trained with the positions of its config.json; delete the line"), "rope_scaling shift_attn"
    ),
    "mixture_of_depths": refused("layers stay as they are; delete the line"),
    "block_diag_attn": no_effect("rows are packed, and no example sees another"),
    "flash_attn": _attention,
    **each(
        no_effect("it is about speed and memory alone"),
        "use_unsloth use_unsloth_gc use_reentrant_gc upcast_layernorm upcast_lmhead_output "
        "use_kv_cache use_v1_kernels disable_version_checking offload_folder device_map compute_dtype "
        "print_param_status",
    ),
    "enable_liger_kernel": no_effect(LIGER_BY_ITSELF),
    "disable_gradient_checkpointing": flag("gradient_checkpointing", on=False, off=True),
    "moe_aux_loss_coef": refused("a router has no loss of its own here; delete the line"),
    "train_from_scratch": refused("training begins with trained weights; delete the line"),
    **each(no_effect("`dsdpo chat` answers by transformers"), "infer_backend infer_dtype"),
    **each(no_effect("a token is read from HF_TOKEN, or from `hf auth login`"), "hf_hub_token om_hub_token"),
    "ms_hub_token": no_effect("a token is read from MODELSCOPE_API_TOKEN"),
    "trust_remote_code": no_effect("no code of a model's folder is run"),
    "quantization_method": _method,
    "quantization_device_map": no_effect("each rank quantizes while it loads"),
    **each(
        no_effect("`dsdpo export` writes the weights"),
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
    ),
    **each(
        no_effect("`dsdpo chat` answers by transformers"),
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
        "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend max_new_tokens top_p top_k "
        "temperature do_sample num_beams repetition_penalty length_penalty skip_special_tokens "
        "predict_with_generate generation_max_length generation_num_beams generation_config",
    ),
    "model_max_length": option("max_length"),
    **DATA,
    # launch
    **each(
        no_effect("it belongs to use_ray, which is not supported"),
        "ray_run_name ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker "
        "placement_strategy ray_init_kwargs",
    ),
    **each(refused("it is an argument of `dsdpo train`; delete the line"), "master_addr master_port"),
    **each(refused("no profile is written; delete the line"), "enable_torch_profiler profile_modules"),
    **each(
        no_effect("it belongs to enable_torch_profiler"),
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
        "profiler_record_shapes profiler_profile_memory profiler_with_stack",
    ),
}

# Rules for names that are ours, too, where every option is LLaMA-Factory's.
OWN: dict[str, Rule] = {"template": template, "adapter_name_or_path": adapters}

# By these, options are LLaMA-Factory's, and not TRL's.
SIGNS = frozenset(LLAMA_FACTORY) - {"generation_max_length", "generation_num_beams", "generation_config"}
SIGNS |= {"dataset_dir", "finetuning_type", "lora_rank", "lora_target", "template", "mask_history"}
SIGNS |= {"quantization_bit", "quantization_type", "double_quantization"}
