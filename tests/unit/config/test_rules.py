"""Rules between options: each one fires on its fault, names the option, and stays silent otherwise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.load import load
from dsdpo.config.rules import adapter_problems, check_rules

MINIMAL = "model_name_or_path: gpt2\ndataset: pairs\noutput_dir: out\n"


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + text)
    return [str(problem) for problem in check_rules(load(path, overrides))]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max_length: 100\nmax_tokens_per_row: 200\n",
        "loss_type: [sft, sigmoid]\nloss_weights: [0.1, 1]\n",
        "loss_type: exo_pair\nlabel_smoothing: 0.001\n",
        "loss_type: [sigmoid, sft]\nf_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.3\n",
        "loss_type: simpo\nbeta: 2.0\nsimpo_gamma: 1.0\n",
        "loss_type: [simpo, sigmoid]\nreference: live\n",
        "loss_type: aot\nlabel_smoothing: 0.1\n",
        "max_tokens_per_row: auto\n",
        "eval_dataset: held_out\neval_steps: 5\n",
        "val_size: 0.1\neval_steps: 5\n",
        "val_size: 40\n",
        "finetuning_type: lora\nlora_rank: 4\nlora_target: q_proj,v_proj\n",
        "finetuning_type: full\n",
        "max_steps: 10\nnum_train_epochs: 3\n",
        "attn_implementation: varlen\nprecision: bf16\n",
        "attn_implementation: varlen\nprecision: fp16\n",
        "attn_implementation: sdpa\nprecision: fp32\n",
    ],
)
def test_sound_configs_pass(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_length: 100\nmax_tokens_per_row: 199\n", "2 * max_length = 200"),
        ("loss_type: [sigmoid, sigmoid]\n", "names a loss twice"),
        ("loss_type: sft\n", "needs a preference loss"),
        ("loss_type: ipo\nlabel_smoothing: 0.1\n", "no loss of loss_type"),
        ("simpo_gamma: 1.0\n", "simpo_gamma is set, but no loss"),
        ("loss_type: exo_pair\n", "needs label_smoothing above 0"),
        ("loss_type: apo_zero\nf_divergence_type: forward_kl\n", "is not defined for apo_zero"),
        ("f_alpha_divergence_coef: 0.3\n", "f_divergence_type is reverse_kl"),
        ("f_divergence_type: forward_kl\nf_alpha_divergence_coef: 0.3\n", "f_divergence_type is forward_kl"),
        ("loss_type: simpo\nld_alpha: 0.5\n", "takes means per token"),
        ("reference: none\n", "sigmoid needs one"),
        ("loss_type: [simpo, sft]\nreference: live\n", "reads one; set auto or none"),
        ("loss_type: aot\nlora_dropout: 0.1\n", "which dropout would make differ"),
        ("loss_type: aot_unpaired\nuse_weighting: true\n", "loss_type aot_unpaired sorts what it compares"),
        ("loss_type: [aot, sigmoid]\nuse_weighting: true\n", "delete use_weighting or change loss_type"),
        ("adapter_name_or_path: a\nlora_rank: 4\n", "whose adapter has its own"),
        ("adapter_name_or_path: a\nfinetuning_type: full\n", "which has no adapters"),
        ("loss_weights: [1, 2]\n", "loss_weights has 2 number(s) for the 1 loss(es)"),
        ("loss_weights: [-1]\n", "at least 0"),
        ("eval_dataset: held_out\nval_size: 0.1\n", "both set"),
        ("val_size: 1.5\n", "a whole number of pairs"),
        ("eval_steps: 5\n", "nothing is held out"),
        ("finetuning_type: full\nlora_rank: 8\n", "lora_rank set while finetuning_type is full"),
        ("lora_target: all,q_proj\n", "`all` stands alone"),
        ("lora_target: []\n", "lora_target is empty"),
        ("lora_target: q_proj,lm_head\n", "the output head"),
        ("attn_implementation: varlen\nprecision: fp32\n", "computes in bf16"),
    ],
)
def test_each_rule_fires(tmp_path: Path, text: str, said: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    assert said in found[0]
    assert "run.yaml:4" in found[0]


@pytest.mark.parametrize(("option", "package"), [("report_to", "wandb"), ("attn_implementation", "flash_attn")])
def test_a_missing_package_is_told_with_its_extra(tmp_path: Path, option: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    value, extra = {"wandb": ("wandb", "track"), "flash_attn": ("flash_attention_2", "flash")}[package]
    found = problems(tmp_path, f"{option}: {value}\n")
    assert len(found) == 1
    assert f"dsdpo[{extra}]" in found[0]


def test_a_rule_keeps_silent_about_an_option_that_is_faulty_itself(tmp_path: Path) -> None:
    assert problems(tmp_path, "max_length: much\nmax_tokens_per_row: 100\n") == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lora_dropout": 0.05, "use_rslora": True, "bias": "none", "modules_to_save": None, "init_lora_weights": "eva"},
        {"target_modules": r"model\.layers\..*_proj"},
        {"target_modules": ".*", "exclude_modules": ["lm_head", "embed_out"]},
        {"target_modules": None},
    ],
)
def test_a_plain_adapter_can_be_trained_further(change: dict[str, Any]) -> None:
    assert adapter_problems({"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], **change}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; allowed: LORA"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is ['embed_tokens']; only plain LoRA"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is all"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the output head"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "the output head"),
        ({"target_modules": ".*"}, "the output head"),
        ({"target_modules": "(q_proj"}, "nor a regular expression"),
        ({"target_modules": 7}, "neither a list of names"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(change: dict[str, Any], said: str) -> None:
    (problem,) = adapter_problems({"peft_type": "LORA", "target_modules": ["q_proj"], **change})
    assert said in problem


def test_lora_options_on_the_command_line_count_as_given(tmp_path: Path) -> None:
    found = problems(tmp_path, "", "--finetuning_type", "full", "--lora_alpha", "16")
    assert "lora_alpha set while finetuning_type is full" in found[0]
    assert "command line" in found[0]
