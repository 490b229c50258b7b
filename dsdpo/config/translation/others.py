"""Files of trainers whose options are not read: told once, instead of an unknown option for each line."""

from __future__ import annotations

from collections.abc import Collection

from dsdpo.config.aliases import ELSEWHERE
from dsdpo.errors import Problem

# Names of options by which a file is told; two of them are enough.
_AXOLOTL = (
    "base_model sequence_len micro_batch_size val_set_size sample_packing dataset_prepared_path lora_target_linear "
    "flash_attention num_epochs lr_scheduler train_on_inputs pad_to_sequence_len rl special_tokens chat_template_jinja"
)
_MS_SWIFT = (
    "rlhf_type train_type tuner_type sft_type tuner_backend target_modules split_dataset_ratio model_author system "
    "attn_impl model val_dataset lazy_tokenize load_from_cache_file torchacc_steps"
)
_OPENRLHF = (
    "pretrain ref_pretrain reward_pretrain micro_train_batch_size zero_stage max_len apply_chat_template "
    "input_key adam_offload max_epochs save_path ckpt_path packing_samples"
)
_LLAMA_FACTORY_V1 = (
    "model model_class train_dataset dist_config kernel_config peft_config quant_config init_config sample_backend "
    "batching_strategy micro_batch_size optim_config"
)
_MEGATRON = (
    "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size context_parallel_size "
    "sequence_parallel use_distributed_optimizer overlap_param_gather overlap_grad_reduce bias_activation_fusion "
    "apply_rope_fusion"
)
_SIGNS = {
    "axolotl": frozenset(_AXOLOTL.split()),
    "ms-swift": frozenset(_MS_SWIFT.split()),
    "OpenRLHF": frozenset(_OPENRLHF.split()),
    "LLaMA-Factory's v1 trainer": frozenset(_LLAMA_FACTORY_V1.split()),
    "LLaMA-Factory's Megatron trainers": frozenset(_MEGATRON.split()),
}


def other_trainer(unknown: Collection[str], place: str) -> list[Problem]:
    """One problem, where options that are unknown here are those of another trainer; else none.

    Args:
        unknown: names that neither this package nor a trainer that it reads has.
        place: where they stand.
    """
    found = {trainer: [name for name in unknown if name in signs] for trainer, signs in _SIGNS.items()}
    trainer = max(found, key=lambda name: len(found[name]))
    if len(found[trainer]) < 2:
        return []
    ours = "; ".join(f"{name}: {ELSEWHERE[name]}" for name in unknown if name in ELSEWHERE)
    text = f"{place}: {', '.join(found[trainer])} are options of {trainer}, whose configs are not read; those of "
    text += "LLaMA-Factory, TRL and the alignment handbook are, and `dsdpo train --help` lists dsdpo's own"
    return [Problem("other-trainer", "", f"{text}{f' ({ours})' if ours else ''}")]
