"""What single options of other trainers mean: values, what is refused, and what is done otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdpo.config.accelerate import run_options
from dsdpo.config.command_line import separate
from dsdpo.config.load import load
from dsdpo.config.rules import check_rules
from tests.unit.config.test_translation import LLAMA_FACTORY, TRL, codes, given, translation, values


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"bf16": False}, {"precision": "fp32"}),
        ({"bf16": None}, {"precision": "auto"}),
        ({"bf16": False, "dtype": "bfloat16"}, {"precision": "bf16"}),
        ({"bf16": True, "dtype": "float32"}, {"precision": "bf16"}),
        ({"torch_dtype": "torch.bfloat16"}, {"precision": "bf16"}),
        ({"dtype": "auto"}, {"precision": "auto"}),
        ({"lora_target_modules": "all-linear", "use_peft": True}, {"lora_target": ["all"]}),
        ({"lora_target_modules": "q_proj v_proj", "use_peft": True}, {"lora_target": ["q_proj", "v_proj"]}),
        ({"report_to": "all"}, {"report_to": ["all"]}),
        ({"report_to": "none"}, {"report_to": []}),
        ({"report_to": []}, {"report_to": []}),
        ({"report_to": "wandb,tensorboard"}, {"report_to": ["wandb", "tensorboard"]}),
        ({"eval_strategy": "no"}, {"eval_dataset": [], "eval_steps": None}),
        ({"eval_strategy": "no", "eval_steps": 10}, {"eval_dataset": [], "eval_steps": None}),
        ({"eval_steps": 10}, {"eval_dataset": [], "eval_steps": None}),
        ({"eval_strategy": "steps", "eval_steps": 10}, {"eval_dataset": ["org/d:test"], "eval_steps": 10}),
        ({"eval_strategy": "epoch", "dataset_test_split": "dev"}, {"eval_dataset": ["org/d:dev"], "eval_steps": None}),
        ({"do_eval": True}, {"eval_dataset": ["org/d:test"]}),
        ({"dataset_train_split": "train_prefs", "dataset_config": "en"}, {"dataset": ["org/d:en:train_prefs"]}),
        ({"dataset_config": "no"}, {"dataset": ["org/d:no:train"]}),
        ({"dataset_name": None, "datasets": "org/e"}, {"dataset": ["org/e"]}),
        ({"dataset_name": None, "dataset_mixture": {"datasets": "org/e"}}, {"dataset": ["org/e"]}),
        ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1, "warmup_steps": 0}),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, {"warmup_ratio": 0.1, "warmup_steps": 10}),
        ({"max_steps": -1}, {"max_steps": None}),
        ({"save_strategy": "no", "save_steps": 50}, {"save_steps": None}),
        ({"save_strategy": "epoch", "save_steps": 50}, {"save_steps": 500}),
        ({"save_total_limit": 0}, {"save_total_limit": None}),
        ({"resume_from_checkpoint": True}, {"resume_from_checkpoint": None}),
        ({"resume_from_checkpoint": "out/c"}, {"resume_from_checkpoint": "out/c"}),
        ({"rpo_alpha": 0.5, "loss_type": "ipo"}, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
        ({"rpo_alpha": 0}, {"loss_type": ["sigmoid"], "loss_weights": None}),
        ({"precompute_ref_log_probs": True}, {"reference": "cached"}),
        ({"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}),
        ({"preprocessing_num_workers": None, "disable_tqdm": None}, {"preprocessing_num_workers": 1}),
    ],
)
def test_options_of_trl(options: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    run = values(tmp_path, TRL | options)
    assert {name: getattr(run, name) for name in want} == want


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"bf16": False, "fp16": False}, {"precision": "auto"}),
        ({"bf16": True, "pure_bf16": True}, {"precision": "bf16"}),
        ({"pref_loss": "orpo", "pref_beta": 0.2}, {"loss_type": ["orpo"], "beta": 0.2}),
        ({"pref_ftx": 1}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
        ({"pref_ftx": 0.0}, {"loss_type": ["sigmoid"], "loss_weights": None}),
        ({"pref_beta": 0.2, "stage": "sft"}, {"beta": 0.1}),
        ({"flash_attn": True}, {"attn_implementation": "flash_attention_2"}),
        ({"flash_attn": "auto"}, {"attn_implementation": "auto"}),
        ({"flash_attn": "disabled"}, {"attn_implementation": "sdpa"}),
        (
            {"template": "qwen"},
            {"default_system": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
        ),
        ({"template": "qwen", "default_system": "Be brief."}, {"default_system": "Be brief."}),
        ({"template": "llama3"}, {"template": "llama3", "default_system": None}),
        ({"lora_rank": 4, "finetuning_type": "full"}, {"lora_rank": 8}),
        ({"lora_rank": 4, "adapter_name_or_path": "a"}, {"lora_rank": 8, "adapter_name_or_path": "a"}),
        ({"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 5}, {"val_size": 0.1, "eval_steps": 5}),
        ({"val_size": 0.1}, {"val_size": 0.1, "eval_steps": None}),
        ({"mask_history": False}, {"mask_history": False}),
        ({"max_samples": "100"}, {"max_samples": 100}),
        ({"model_revision": "main"}, {}),
        ({"double_quantization": True, "quantization_type": "nf4"}, {}),
    ],
)
def test_options_of_llama_factory(options: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    found = given(tmp_path, LLAMA_FACTORY | options)
    assert [*found.problems, *check_rules(found, here=False)] == []
    assert {name: getattr(found.config, name) for name in want} == want


@pytest.mark.parametrize(
    ("base", "options", "problem"),
    [
        # another loss
        (LLAMA_FACTORY, {"stage": "kto", "pref_ftx": 0.5}, ("not-supported", "pref_ftx")),
        (LLAMA_FACTORY, {"pref_loss": "kto_pair"}, ("not-supported", "pref_loss")),
        (LLAMA_FACTORY, {"pref_bco_weight": 0.1}, ("not-supported", "pref_bco_weight")),
        (LLAMA_FACTORY, {"stage": "sft", "train_on_prompt": True}, ("not-supported", "train_on_prompt")),
        (TRL, {"stage": "sft", "loss_type": "dft"}, ("not-supported", "loss_type")),
        (TRL, {"stage": "kto", "loss_type": "apo_zero_unpaired"}, ("not-supported", "loss_type")),
        (TRL, {"stage": "sft", "assistant_only_loss": False}, ("not-supported", "assistant_only_loss")),
        (TRL, {"label_smoothing_factor": 0.1}, ("not-supported", "label_smoothing_factor")),
        # another text
        (LLAMA_FACTORY, {"template": "default"}, ("not-supported", "template")),
        (LLAMA_FACTORY, {"enable_thinking": False}, ("not-supported", "enable_thinking")),
        (TRL, {"max_length": None}, ("value", "max_length")),
        # no number
        (TRL, {"rpo_alpha": "half"}, ("value", "loss_weights")),
        (LLAMA_FACTORY, {"pref_ftx": [0.5]}, ("value", "loss_weights")),
        (LLAMA_FACTORY, {"warmup_steps": float("inf")}, ("value", "warmup_steps")),
        (TRL, {"warmup_steps": float("nan")}, ("value", "warmup_steps")),
        # neither on nor off
        (TRL, {"bf16": "treu"}, ("not-supported", "bf16")),
        (TRL, {"use_peft": "lora"}, ("not-supported", "use_peft")),
        (TRL, {"use_peft": True, "load_in_4bit": "nf4"}, ("not-supported", "load_in_4bit")),
        (TRL, {"use_flash_attention_2": 2}, ("not-supported", "use_flash_attention_2")),
        (LLAMA_FACTORY, {"fp16": "auto"}, ("not-supported", "fp16")),
        (
            LLAMA_FACTORY,
            {"disable_gradient_checkpointing": "full"},
            ("not-supported", "disable_gradient_checkpointing"),
        ),
        # another course
        (LLAMA_FACTORY, {"lr_scheduler_type": "constant", "warmup_steps": 5}, ("not-supported", "warmup_steps")),
        (TRL, {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, ("not-supported", "warmup_ratio")),
        (TRL, {"lr_scheduler_type": "reduce_lr_on_plateau"}, ("value", "lr_scheduler_type")),
        (TRL, {"optim": "paged_adamw_8bit"}, ("not-supported", "optim")),
        (TRL, {"data_seed": 1}, ("not-supported", "data_seed")),
        (TRL, {"train_sampling_strategy": "sequential"}, ("not-supported", "train_sampling_strategy")),
        # another model
        (TRL, {"use_peft": True, "lora_modules_to_save": ["lm_head"]}, ("not-supported", "lora_modules_to_save")),
        (TRL, {"stage": "dpo", "lora_modules_to_save": ["score"]}, ("not-supported", "lora_modules_to_save")),
        (LLAMA_FACTORY, {"adapter_name_or_path": "a,b"}, ("not-supported", "adapter_name_or_path")),
        (LLAMA_FACTORY, {"ref_model": "other"}, ("not-supported", "ref_model")),
        (LLAMA_FACTORY, {"rope_scaling": "linear"}, ("not-supported", "rope_scaling")),
        (
            LLAMA_FACTORY,
            {"quantization_bit": 4, "quantization_method": "hqq"},
            ("not-supported", "quantization_method"),
        ),
    ],
)
def test_what_would_train_something_else_is_refused(
    base: dict[str, Any], options: dict[str, Any], problem: tuple[str, str], tmp_path: Path
) -> None:
    assert codes(given(tmp_path, base | options)) == [problem]


def test_noise_on_embeddings_is_no_silent_loss_beside_another_stage(tmp_path: Path) -> None:
    found = given(tmp_path, TRL | {"neftune_noise_alpha": 5})
    assert [problem.code for problem in check_rules(found, here=False)] == ["stage-options"]
    assert check_rules(given(tmp_path, TRL | {"neftune_noise_alpha": None}), here=False) == []


@pytest.mark.parametrize(
    ("base", "options", "differs"),
    [
        (TRL, {"stage": "sft", "assistant_only_loss": True}, []),
        (TRL, {"stage": "sft"}, ["assistant_only_loss"]),
        (TRL, {"stage": "sft", "packing": True, "completion_only_loss": True}, ["packing"]),
        (LLAMA_FACTORY, {"stage": "sft", "neat_packing": True}, ["packing", "cutoff_len"]),
        (LLAMA_FACTORY, {"stage": "pt"}, ["packing"]),
        (LLAMA_FACTORY, {"max_source_length": 512}, ["max_source_length", "cutoff_len"]),
        (TRL, {"max_prompt_length": 512, "max_completion_length": None}, ["max_prompt_length"]),
        (LLAMA_FACTORY, {"adapter_name_or_path": "a"}, ["cutoff_len", "adapter_name_or_path"]),
        (LLAMA_FACTORY, {"adapter_name_or_path": "a", "pref_loss": "simpo"}, ["cutoff_len"]),
        (LLAMA_FACTORY, {"adapter_name_or_path": "a", "stage": "sft"}, ["cutoff_len"]),
        (LLAMA_FACTORY, {}, ["cutoff_len"]),
        (LLAMA_FACTORY, {"truncation_mode": "keep_end"}, []),
    ],
)
def test_what_is_done_otherwise_is_told(
    base: dict[str, Any], options: dict[str, Any], differs: list[str], tmp_path: Path
) -> None:
    found = translation(given(tmp_path, base | options))
    assert list(found.differs) == differs
    assert all(text in "\n".join(found.lines()) for text in found.differs.values())


def test_our_names_keep_our_meaning_beside_options_of_ours_alone(tmp_path: Path) -> None:
    options = {"template": "default", "lr_scheduler_type": "constant", "warmup_ratio": 0.1, "max_refused": 0.01}
    run = values(tmp_path, LLAMA_FACTORY | options)
    assert (run.template, run.lr_scheduler_type, run.warmup_ratio) == ("default", "constant", 0.1)


# --- the command line ---


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        (["--bf16"], {"precision": "bf16"}),
        (["--use_peft"], {"finetuning_type": "lora", "lora_rank": 16}),
        (["--use_peft", "--lora-r", "4"], {"lora_rank": 4}),
        (["--use_peft", "--lora_target_modules", "q_proj", "k_proj"], {"lora_target": ["q_proj", "k_proj"]}),
        (["--no_use_peft"], {"finetuning_type": "full"}),
        (["--no-bf16"], {"precision": "fp32"}),
        (["--bf16", "f"], {"precision": "fp32"}),
        (["--bf16=N"], {"precision": "fp32"}),
        (["--use_peft", "t", "--lora_r", "4"], {"finetuning_type": "lora", "lora_rank": 4}),
        (["--use_peft", "n"], {"finetuning_type": "full"}),
        (["--torch_compile"], {"kernels": "compile"}),
        (["--torch_compile", "False", "--use_liger_kernel"], {"kernels": "auto"}),
        (["--gradient_checkpointing", "y"], {"gradient_checkpointing": "full"}),
        (["--gradient_checkpointing", "f", "beta=0.2"], {"gradient_checkpointing": "none", "beta": 0.2}),
        (["--use_peft", "--lora_target_modules", '["q_proj", "k_proj"]'], {"lora_target": ["q_proj", "k_proj"]}),
        (["--use_peft", "lora_target_modules=[q_proj,k_proj]"], {"lora_target": ["q_proj", "k_proj"]}),
        (["--push_to_hub", "--learning_rate=3e-6"], {"learning_rate": 3e-6}),
        (["--gradient_checkpointing", "--eval_strategy", "no"], {"gradient_checkpointing": "full"}),
        (["--run_name", "beta=0.1"], {"run_name": "beta=0.1", "beta": 0.1}),
        (["--bf16", "beta=0.2", "--use_peft"], {"precision": "bf16", "beta": 0.2, "finetuning_type": "lora"}),
        (["beta=0.2", "use_peft=true"], {"beta": 0.2, "finetuning_type": "lora"}),
        (["--report_to", "wandb", "beta=0.2"], {"beta": 0.2, "report_to": ["wandb"]}),
    ],
)
def test_a_command_of_trl(tokens: list[str], want: dict[str, Any]) -> None:
    """Without a file, as `trl dpo` takes it."""
    words = (
        "--stage dpo --model_name_or_path org/m --dataset_name org/d --output_dir out --per_device_train_batch_size 8"
    )
    found = load(None, [*words.split(), *tokens], ranks=2)
    assert found.problems == [] and found.config is not None
    assert (found.config.dataset, found.config.train_batch_size) == (["org/d"], 16)
    assert {name: getattr(found.config, name) for name in want} == want


def test_assignments_stand_after_a_file(tmp_path: Path) -> None:
    """As `llamafactory-cli train FILE key=value` takes them."""
    run = values(tmp_path, LLAMA_FACTORY, "learning_rate=2e-5", "lora_target=q_proj,v_proj", "cutoff_len=128")
    assert (run.learning_rate, run.lora_target, run.max_length) == (2e-5, ["q_proj", "v_proj"], 128)
    assert codes(given(tmp_path, LLAMA_FACTORY, "learning_rte=2e-5")) == [("stray-argument", "")]


def test_assignments_are_options_of_the_run_and_no_arguments_of_the_command() -> None:
    words = ["a.yaml", "learning_rate=1e-5", "--fresh", "--report_to", "wandb", "cutoff_len=9"]
    own, options = separate(words, {"--fresh": 0})
    assert own == ["a.yaml", "--fresh"]
    assert options == ["learning_rate=1e-5", "--report_to", "wandb", "cutoff_len=9"]
    assert separate(["--bf16", "a.yaml"], {}) == (["a.yaml"], ["--bf16"])


# --- accelerate ---


@pytest.fixture
def accelerate_file(tmp_path: Path) -> Path:
    path = tmp_path / "accelerate.yaml"
    block = {"zero_stage": 3, "offload_optimizer_device": "cpu", "gradient_clipping": 0.7}
    settings = {
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "bf16",
        "num_processes": 8,
        "deepspeed_config": block,
    }
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **settings}))
    return path


def test_a_config_of_accelerate_is_followed(accelerate_file: Path, tmp_path: Path) -> None:
    run = values(tmp_path, TRL | {"deepspeed": str(accelerate_file)})
    assert run.deepspeed == {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    assert (run.precision, run.max_grad_norm) == ("bf16", 0.7)
    assert values(tmp_path, TRL | {"deepspeed": str(accelerate_file), "max_grad_norm": 0.2}).max_grad_norm == 0.2


def test_accelerate_launch_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.3")
    run = values(tmp_path, TRL)
    assert run.deepspeed == {"zero_optimization": {"stage": 2}}
    assert (run.precision, run.max_grad_norm) == ("bf16", 0.3)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(config))
    assert values(tmp_path, TRL).deepspeed == str(config)
    assert values(tmp_path, TRL | {"deepspeed": "own.json"}).deepspeed == "own.json"


def test_a_config_of_accelerate_names_what_is_offloaded_and_where() -> None:
    block = {"zero_stage": 3, "offload_param_device": "nvme", "offload_param_nvme_path": "/fast"}
    file = {"distributed_type": "DEEPSPEED", "deepspeed_config": block}
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/fast"}}
    assert run_options(file)["deepspeed"] == {"zero_optimization": zero}
    block["zero_stage"] = 2  # where parameters are not sharded, none are offloaded
    assert run_options(file)["deepspeed"] == {"zero_optimization": {"stage": 2}}
    assert run_options(file | {"mixed_precision": "fp8"}) == {}  # so that the file is refused


# --- trainers that are not read ---


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({"base_model": "m", "sequence_len": 512, "micro_batch_size": 2, "rl": "dpo", "adapter": "lora"}, "axolotl"),
        ({"model": "m", "rlhf_type": "dpo", "train_type": "lora", "dataset": "d#500", "output_dir": "o"}, "ms-swift"),
        ({"model": "m", "train_dataset": "d", "dist_config": {"name": "fsdp2"}, "micro_batch_size": 1}, "v1"),
        ({**LLAMA_FACTORY, "tensor_model_parallel_size": 2, "sequence_parallel": True}, "Megatron"),
        ({"pretrain": "m", "max_len": 512, "zero_stage": 3, "learning_rate": 1e-6}, "OpenRLHF"),
    ],
)
def test_a_file_of_another_trainer_is_told_once(options: dict[str, Any], trainer: str, tmp_path: Path) -> None:
    found = given(tmp_path, options)
    assert codes(found) == [("other-trainer", "")] and trainer in str(found.problems[0])
    assert found.config is None


def test_one_unknown_name_is_no_other_trainer(tmp_path: Path) -> None:
    assert codes(given(tmp_path, LLAMA_FACTORY | {"num_epochs": 3})) == [("unknown-option", "num_epochs")]
