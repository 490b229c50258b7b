"""What each key of a DeepSpeed JSON means here: owned by the run config, fixed, refused or passed on.

A key inside a block is written with a dot. `tests/unit/config/test_deepspeed.py` holds the sets against the
installed DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsdpo.config.schedules import SCHEDULES
from dsdpo.config.schema import RunConfig


def _names(text: str, block: str = "") -> frozenset[str]:
    return frozenset(f"{block}{name}" for name in text.split())


ZERO = "zero_optimization"
OFFLOAD_OPTIMIZER, OFFLOAD_PARAM = f"{ZERO}.offload_optimizer", f"{ZERO}.offload_param"
HPZ = f"{ZERO}.zero_hpz_partition_size"
BLOCKS = _names(
    "zero_optimization bf16 bfloat16 fp16 optimizer optimizer.params scheduler scheduler.params data_types"
) | {
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    "aio",
}

_BF16 = {"bf16": True, "fp32": False, "fp16": False}


def _scheduler(config: RunConfig) -> str | None:
    """DeepSpeed's name of the schedule, which has no settings there."""
    return (SCHEDULES[config.lr_scheduler_type].deepspeed or None) if not config.lr_scheduler_kwargs else None


# key -> (option that owns it, its value there; None: the two cannot be compared)
OWNED: dict[str, tuple[str, Callable[[RunConfig], Any]]] = {
    "train_batch_size": ("train_batch_size", lambda c: c.train_batch_size),
    "train_micro_batch_size_per_gpu": ("max_tokens_per_row", lambda c: None),
    "gradient_accumulation_steps": ("max_tokens_per_row", lambda c: None),
    "gradient_clipping": ("max_grad_norm", lambda c: c.max_grad_norm),
    "bf16.enabled": ("precision", lambda c: _BF16.get(c.precision)),
    "bfloat16.enabled": ("precision", lambda c: _BF16.get(c.precision)),
    "fp16.enabled": ("precision", lambda c: c.precision == "fp16"),  # which auto never is
    "optimizer.params.lr": ("learning_rate", lambda c: c.learning_rate),
    "optimizer.params.betas": ("adam_beta1", lambda c: [c.adam_beta1, c.adam_beta2]),
    "optimizer.params.eps": ("adam_epsilon", lambda c: c.adam_epsilon),
    "optimizer.params.weight_decay": ("weight_decay", lambda c: c.weight_decay),
    "scheduler.type": ("lr_scheduler_type", _scheduler),
    "scheduler.params.warmup_max_lr": ("learning_rate", lambda c: c.learning_rate),
    "scheduler.params.warmup_num_steps": ("warmup_steps", lambda c: c.warmup_steps or None),
    "scheduler.params.total_num_steps": ("max_steps", lambda c: c.max_steps),
}

# key -> the one value that training uses
FIXED: dict[str, Any] = {
    "optimizer.type": "AdamW",
    "optimizer.params.adam_w_mode": True,
    "optimizer.params.torch_adam": True,
    "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_type": "linear",
    "communication_data_type": "fp32",
    "data_types.grad_accum_dtype": "fp32",
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "dataloader_drop_last": False,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "fp16.auto_cast": False,
    "fp16.fp16_master_weights_and_grads": False,
    "zero_optimization.compute_grad_norm": True,
    f"{OFFLOAD_OPTIMIZER}.fast_init": False,
    f"{OFFLOAD_OPTIMIZER}.ratio": 1.0,
    f"{OFFLOAD_OPTIMIZER}.super_offload": False,
}

_UNSUPPORTED = _names(
    "pipeline tensor_parallel expert_parallel sequence_parallel_size "
    "use_data_before_expert_parallelism hybrid_engine data_efficiency compile autotuning "
    "weight_quantization datastates_ckpt elasticity nebula compression_training quantize_training "
    "sparse_gradients sparse_attention eigenvalue graph_harvesting curriculum_learning "
    "progressive_layer_drop zero_optimization.zenflow zero_optimization.mics_shard_size "
    "zero_optimization.mics_hierarchical_params_gather"
)
_PARAM_SWAP = _names("nvme_path buffer_count buffer_size max_in_cpu", f"{OFFLOAD_PARAM}.")
_PIPELINE = _names("pipeline_read pipeline_write", f"{OFFLOAD_OPTIMIZER}.")
_OLD_OFFLOAD = _names("cpu_offload cpu_offload_param cpu_offload_use_pin_memory", f"{ZERO}.")
_ZEROPP = _names(
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients zeropp_loco_param",
    f"{ZERO}.",
)

# Seen with 0.19.8: "param 14 already assigned swap buffer id", from __prefetch_nvme_param_partitions.
NO_PARAM_SWAP = (
    "parameters cannot be offloaded to NVMe: where forward turns into backward, DeepSpeed reads the same one ahead "
    "twice, and stops"
)

# key -> what to do instead; an error unless the JSON switches it off
REFUSED: dict[str, str] = {
    "torch_autocast": "set precision: bf16 or fp16 in the run config",
    "amp": "set precision: bf16 or fp16 in the run config",
    "data_types.param_dtype": "set precision in the run config",
    "data_types.buffer_dtype": "set precision in the run config",
    "activation_checkpointing": "set gradient_checkpointing in the run config",
    "tensorboard": "set report_to: tensorboard in the run config",
    "wandb": "set report_to: wandb in the run config",
    "csv_monitor": "metrics are in output_dir/metrics.jsonl; delete the key",
    "comet": "set report_to in the run config",
    **dict.fromkeys(_UNSUPPORTED, "not supported; delete the key"),
    **dict.fromkeys(_PARAM_SWAP, f"{NO_PARAM_SWAP}; delete the key and set device to cpu"),
    f"{OFFLOAD_OPTIMIZER}.cpuadam_cores_perc": "it is for super_offload, which is not supported; delete the key",
    "aio.use_gds": "GPUDirect Storage is not supported; delete the key",
    f"{ZERO}.legacy_stage1": "DeepSpeed has no such stage 1 any more; delete the key",
    **dict.fromkeys(_PIPELINE, "with it, a checkpoint read the optimizer's state back wrong from NVMe; delete the key"),
    **dict.fromkeys(_OLD_OFFLOAD, 'write "offload_optimizer": {"device": "cpu"}, or offload_param, instead'),
    **dict.fromkeys(_ZEROPP, "of ZeRO++ only zero_hpz_partition_size is supported; delete the key"),
}

# Keys that are left out, since they change no result. With round_robin_gradients, DeepSpeed's map from parameters to
# optimizer state is wrong, and a checkpoint would mix them up: _link_all_hp_params of 0.19.8 counts offsets in the
# order before the reordering that the flag asks for.
IGNORED = _names("round_robin_gradients", f"{ZERO}.")

FLAGS = _names(
    "wall_clock_breakdown memory_breakdown dump_state disable_python_gc disable_allgather prescale_gradients "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer bf16.immediate_grad_update bf16.check_grad_overflow "
    "bf16.check_overflow bfloat16.immediate_grad_update bfloat16.check_grad_overflow aio.single_submit "
    "aio.overlap_events fp16.consecutive_hysteresis"
) | _names(
    "offload_optimizer.pin_memory offload_param.pin_memory "
    "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
    "overlap_comm load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save "
    "stage3_gather_fp16_weights_on_model_save stage3_use_all_reduce_for_fetch_params "
    "stage3_allgather_sequential ignore_unused_parameters "
    "parameter_alignment memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
    "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
    f"{ZERO}.",
)
SIZES = _names("block_size queue_depth intra_op_parallelism", "aio.") | _names(
    "offload_optimizer.buffer_count "
    "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_module_granularity_threshold",
    f"{ZERO}.",
)
ZERO_OTHER = _names(
    "stage leaf_module offload_optimizer.device offload_optimizer.nvme_path offload_param.device "
    "zero_hpz_partition_size",
    f"{ZERO}.",
)

# The two keys about hysteresis change nothing: they delay a lower scale by steps that are skipped, and none is here.
COUNTS = _names(
    "steps_per_print gradient_predivide_factor vocabulary_size fp16.loss_scale_window fp16.hysteresis "
    "fp16.min_loss_scale"
)
# key -> the type and the highest value, of a scale that fp32 holds
LOSS_SCALES = {"fp16.loss_scale": (float, 2**127), "fp16.initial_scale_power": (int, 127)}
SETTINGS = _names("flops_profiler comms_logger timers checkpoint")

# Engine keys that go to DeepSpeed as they are.
PASSED = (
    FLAGS
    | SIZES
    | COUNTS
    | LOSS_SCALES.keys()
    | SETTINGS
    | ZERO_OTHER
    | _names("seq_parallel_communication_data_type log_level data_types.keep_in_fp32_modules")
)
