"""Options of ours that other trainers have, too, under the same name."""

from __future__ import annotations

# One of the others is a sign of a run config of ours.
_NAMES = (
    "model_name_or_path stage finetuning_type lora_rank lora_alpha lora_dropout lora_target adapter_name_or_path "
    "create_new_adapter attn_implementation gradient_checkpointing disable_dropout dataset eval_dataset val_size "
    "dataset_dir template default_system mask_history max_length max_samples preprocessing_num_workers cache_dir "
    "mix_strategy interleave_probs neftune_noise_alpha truncation_mode loss_type loss_weights beta "
    "label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau simpo_gamma "
    "cpo_alpha center_rewards_coefficient desirable_weight undesirable_weight num_train_epochs max_steps "
    "learning_rate lr_scheduler_type warmup_ratio warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm seed deepspeed output_dir logging_steps save_steps save_total_limit resume_from_checkpoint "
    "eval_steps report_to run_name plot_loss disable_tqdm quantization_bit quantization_type double_quantization "
    "model_revision lr_scheduler_kwargs push_to_hub hub_model_id hub_private_repo"
)
COMMON = frozenset(_NAMES.split())
