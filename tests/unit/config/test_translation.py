"""Options of other trainers, one by one: from files, the command line and accelerate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml

from dsdpo.config.load import LoadResult, load
from dsdpo.config.translation.translate import Translation
from dsdpo.runtime.rundir import RunDir
from dsdpo.tools.import_config import report

LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "m",
    "dataset": "d",
    "output_dir": "out",
    "stage": "dpo",
    "do_train": True,
    "per_device_train_batch_size": 2,
    "cutoff_len": 512,
}
TRL: dict[str, Any] = {"model_name_or_path": "m", "dataset_name": "org/d", "output_dir": "out", "stage": "dpo"}


def given(tmp_path: Path, options: dict[str, Any], *tokens: str, ranks: int | None = 1) -> LoadResult:
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return load(path, tokens, ranks=ranks)


def values(tmp_path: Path, options: dict[str, Any], *tokens: str, ranks: int | None = 1) -> Any:
    """The run config, of which nothing is wrong."""
    found = given(tmp_path, options, *tokens, ranks=ranks)
    assert found.problems == []
    return found.config


def codes(found: LoadResult) -> list[tuple[str, str]]:
    return [(problem.code, problem.option) for problem in found.problems]


def translation(found: LoadResult) -> Translation:
    assert found.translation is not None
    return found.translation


# --- defaults ---


@pytest.mark.parametrize(
    ("stage", "config"),
    [("dpo", trl.DPOConfig), ("sft", trl.SFTConfig), ("rm", trl.RewardConfig), ("kto", trl.KTOConfig)],
)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_defaults_are_those_of_trl(stage: str, config: Any, adapter: bool, tmp_path: Path) -> None:
    """Of every option that both have under one name; the others are compared by hand."""
    fields = {
        one.name: one.default_factory() if one.default is dataclasses.MISSING else one.default
        for one in (*dataclasses.fields(config), *dataclasses.fields(trl.ModelConfig))
        if one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING
    }
    run = values(tmp_path, TRL | {"stage": stage, "use_peft": adapter})
    same = [
        *("learning_rate", "num_train_epochs", "lr_scheduler_type", "max_length", "weight_decay", "warmup_steps"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "save_steps"),
        *("loss_type", "beta", "label_smoothing", "ld_alpha", "f_divergence_type", "use_weighting", "discopop_tau"),
        *("desirable_weight", "undesirable_weight", "loss_weights", "f_alpha_divergence_coef"),
    ]
    same = [
        name for name in same if name in fields and (name, stage) not in [("loss_type", "sft"), ("loss_type", "kto")]
    ]
    assert {name: getattr(run, name) for name in same} == {name: fields[name] for name in same}
    assert run.train_batch_size == fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"]
    # RewardTrainer leaves longer pairs out, KTOTrainer cuts the ends off
    truncation = fields.get("truncation_mode", "refuse" if stage == "rm" else "keep_start")
    assert run.truncation_mode == truncation
    assert run.disable_dropout == fields.get("disable_dropout", False)
    assert run.center_rewards_coefficient == (fields.get("center_rewards_coefficient") or 0.0)
    assert run.finetuning_type == ("lora" if adapter else "full")
    if adapter:
        shape = ("lora_r", "lora_alpha", "lora_dropout")
        assert (run.lora_rank, run.lora_alpha, run.lora_dropout) == tuple(fields[name] for name in shape)


def test_lora_target_of_trl_is_peft_s_choice(tmp_path: Path) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as chosen

    run = values(tmp_path, TRL | {"use_peft": True})
    families = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")
    assert [chosen[family] for family in families] == [run.lora_target] * len(families)


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "kto"])
def test_defaults_of_llama_factory(stage: str, tmp_path: Path) -> None:
    """Those of transformers, and cutoff_len 2048, lora_rank 8, lora_target all; dpo and kto switch dropout off."""
    options = {key: value for key, value in LLAMA_FACTORY.items() if "batch" not in key and key != "cutoff_len"}
    run = values(tmp_path, options | {"stage": stage}, ranks=2)
    transformers = (run.learning_rate, run.num_train_epochs, run.lr_scheduler_type, run.train_batch_size)
    assert transformers == (5e-5, 3.0, "linear", 16)
    assert (run.max_length, run.finetuning_type, run.lora_rank, run.lora_alpha) == (2048, "lora", 8, None)
    assert (run.lora_target, run.disable_dropout) == (["all"], stage in ("dpo", "kto"))


def test_an_option_of_ours_alone_keeps_our_defaults(tmp_path: Path) -> None:
    run = values(tmp_path, LLAMA_FACTORY | {"max_refused": 0.5})
    assert (run.learning_rate, run.num_train_epochs, run.lr_scheduler_type) == (1e-5, 1.0, "cosine")
    assert run.max_length == 512


@pytest.mark.parametrize(
    "tokens", [["--max_time", "1h"], ["--train_batch_size=9"], ["--lora_r", "4"], ["--val_split=example"]]
)
def test_the_command_line_changes_no_more_than_it_says(tokens: list[str], tmp_path: Path) -> None:
    """The file is still LLaMA-Factory's, with its defaults."""
    run = values(tmp_path, LLAMA_FACTORY, *tokens)
    assert (run.learning_rate, run.num_train_epochs, run.lr_scheduler_type) == (5e-5, 3.0, "linear")


@pytest.mark.parametrize("tokens", [["--cutoff_len", "256"], ["max_seq_length=256"], ["--bf16", "--lora_r", "4"]])
def test_a_run_config_of_ours_stays_ours(tokens: list[str], tmp_path: Path) -> None:
    """Also one whose options all have their names at other trainers, too."""
    options = {"model_name_or_path": "m", "dataset": "d", "output_dir": "out", "stage": "dpo", "cache_dir": "c"}
    plain, changed = values(tmp_path, options), values(tmp_path, options, *tokens)
    said = {"max_length", "precision", "lora_rank"}
    assert changed.model_dump(exclude=said) == plain.model_dump(exclude=said) and changed != plain


def test_a_command_of_another_trainer_may_have_options_of_ours_that_change_nothing_learned() -> None:
    words = [
        "--stage",
        "dpo",
        "--model_name_or_path",
        "m",
        "--dataset_name",
        "org/d",
        "--output_dir",
        "o",
        "--max_time",
        "1h",
    ]
    trls, ours = load(None, words, ranks=1).config, load(None, [*words, "--val_split=example"], ranks=1).config
    assert trls is not None and (trls.learning_rate, trls.num_train_epochs) == (1e-6, 3.0)
    assert ours is not None and (ours.learning_rate, ours.num_train_epochs) == (1e-5, 1.0)


# --- the size of a step ---


@pytest.mark.parametrize(
    ("options", "ranks", "size"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, 4, 64),
        ({"per_device_train_batch_size": 3}, 2, 6),
        ({"gradient_accumulation_steps": 4}, 2, 64),
        ({"per_gpu_train_batch_size": 4, "gradient_accumulation_steps": "2"}, 1, 8),
        ({"per_device_train_batch_size": 2}, None, 2),
        ({"per_device_train_batch_size": 2, "train_batch_size": 8}, 4, 8),
    ],
)
def test_the_size_of_a_step(options: dict[str, Any], ranks: int | None, size: int, tmp_path: Path) -> None:
    found = given(tmp_path, TRL | options, ranks=ranks)
    assert found.problems == [] and found.config is not None
    assert found.config.train_batch_size == size
    assert translation(found).needs_ranks == (ranks is None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"per_device_train_batch_size": 2, "train_batch_size": 16}, ("set-twice", "train_batch_size")),
        ({"per_device_train_batch_size": 0}, ("value", "per_device_train_batch_size")),
        ({"gradient_accumulation_steps": "auto"}, ("value", "gradient_accumulation_steps")),
        ({"per_device_train_batch_size": "inf"}, ("value", "per_device_train_batch_size")),
        ({"per_device_train_batch_size": "nan"}, ("value", "per_device_train_batch_size")),
    ],
)
def test_a_wrong_size_of_a_step(options: dict[str, Any], problem: tuple[str, str], tmp_path: Path) -> None:
    assert codes(given(tmp_path, TRL | options, ranks=4)) == [problem]


def test_a_run_keeps_the_size_of_a_step_that_it_was_begun_with(tmp_path: Path) -> None:
    options = TRL | {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "out")}
    begun = RunDir(tmp_path / "out").run_config
    begun.parent.mkdir()
    begun.write_text(yaml.safe_dump({"train_batch_size": 48}))
    assert values(tmp_path, options, ranks=4).train_batch_size == 48
    assert values(tmp_path, options, ranks=None).train_batch_size == 48
    path = tmp_path / "other.yaml"
    fresh = load(path, fresh=True, ranks=4).config
    assert fresh is not None and fresh.train_batch_size == 8


# --- two names for one option ---


@pytest.mark.parametrize(
    ("options", "tokens", "name", "value"),
    [
        ({"cutoff_len": 512}, ["--max_length", "256"], "max_length", 256),
        ({"max_length": 512}, ["--cutoff_len", "256"], "max_length", 256),
        ({"pref_beta": 0.3}, ["--beta=0.2"], "beta", 0.2),
        ({"pref_beta": 0.3}, ["--dpo_beta=0.2"], "beta", 0.2),
        ({"bf16": True}, ["--precision", "fp32"], "precision", "fp32"),
        ({"precision": "fp32"}, ["--bf16"], "precision", "bf16"),
        ({"bf16": True}, ["--no_bf16"], "precision", "auto"),
        ({"per_device_train_batch_size": 2}, ["--train_batch_size", "5"], "train_batch_size", 5),
        ({"per_device_train_batch_size": 2}, ["--per-device-train-batch-size=7"], "train_batch_size", 7),
        ({"learning_rate": 1e-3}, ["learning_rate=1e-5"], "learning_rate", 1e-5),
        ({"eval_dataset": "e", "eval_steps": 5}, ["--eval_strategy", "no"], "eval_steps", None),
        ({"save_steps": 5}, ["--save_strategy=no"], "save_steps", None),
    ],
)
def test_the_command_line_wins_whatever_the_names_are(
    options: dict[str, Any], tokens: list[str], name: str, value: Any, tmp_path: Path
) -> None:
    base = {key: one for key, one in LLAMA_FACTORY.items() if key != "cutoff_len"}
    assert getattr(values(tmp_path, base | options, *tokens), name) == value


def test_an_option_of_which_the_command_line_replaces_a_part_is_told_by_the_other(tmp_path: Path) -> None:
    sets = {"datasets": [{"id": "org/e"}], "test_split_size": 20}
    options = {name: value for name, value in TRL.items() if name != "dataset_name"} | {"dataset_mixture": sets}
    found = given(tmp_path, options, "--dataset", "other")
    assert found.config is not None and (found.config.dataset, found.config.val_size) == (["other"], 20)
    assert translation(found).renamed["dataset_mixture"] == "val_size 20"
    assert "dataset_mixture" not in translation(found).no_effect


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"max_length": 256}, "max_length"),
        ({"model_max_length": 256}, "max_length"),
        ({"pref_beta": 0.2, "beta": 0.3}, "beta"),
        ({"bf16": True, "precision": "fp32"}, "precision"),
        ({"lora_rank": 8, "lora_r": 16}, "lora_rank"),
        ({"dataset_name": "org/other"}, "dataset"),
    ],
)
def test_two_names_that_differ_are_told(options: dict[str, Any], option: str, tmp_path: Path) -> None:
    assert codes(given(tmp_path, LLAMA_FACTORY | options)) == [("set-twice", option)]


def test_two_names_that_agree_are_no_problem(tmp_path: Path) -> None:
    options = {"max_length": 512, "bf16": True, "precision": "bf16", "lora_rank": 16, "lora_r": 16}
    run = values(tmp_path, LLAMA_FACTORY | options)
    assert (run.max_length, run.precision, run.lora_rank) == (512, "bf16", 16)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"pref_beta": 0.3}, "beta", 0.3),
        ({"pref_loss": "hinge"}, "loss_type", ["hinge"]),
        ({"dpo_label_smoothing": 0.2}, "label_smoothing", 0.2),
    ],
)
def test_beside_an_option_of_ours_alone_the_stage_is_our_default(
    options: dict[str, Any], name: str, value: Any, tmp_path: Path
) -> None:
    without = {key: one for key, one in LLAMA_FACTORY.items() if key != "stage"}
    run = values(tmp_path, without | options | {"max_refused": 0.5})
    assert (run.stage, getattr(run, name)) == ("dpo", value)


def test_names_of_several_trainers_may_stand_in_one_file(tmp_path: Path) -> None:
    """Then our defaults count."""
    options = {"model_name_or_path": "m", "dataset_name": "org/d", "output_dir": "out", "lora_r": 4, "pref_beta": 0.2}
    found = given(tmp_path, options | {"gradient_clipping": 0.5, "stage": "dpo", "train_batch_size": 12})
    run = found.config
    assert found.problems == [] and run is not None
    assert (run.dataset, run.lora_rank, run.beta, run.max_grad_norm) == (["org/d"], 4, 0.2, 0.5)
    assert (run.train_batch_size, run.learning_rate, run.num_train_epochs) == (12, 1e-5, 1.0)


@pytest.mark.parametrize("options", [LLAMA_FACTORY, TRL], ids=["LLaMA-Factory", "TRL"])
def test_a_stage_that_nothing_tells_is_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    without = {name: value for name, value in options.items() if name != "stage"}
    assert codes(given(tmp_path, without)) == [("stage-unknown", "stage")]
    assert codes(given(tmp_path, without | {"beta": 0.1})) == [("stage-unknown", "stage")]  # dpo, kto, orpo or cpo
    assert values(tmp_path, without, "--stage", "sft").stage == "sft"


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ({"max_seq_length": 512}, "sft"),
        ({"completion_only_loss": True}, "sft"),
        ({"ld_alpha": 0.2}, "dpo"),
        ({"loss_type": "ipo"}, "dpo"),
        ({"rpo_alpha": 1.0}, "dpo"),
        ({"loss_type": "kto"}, "kto"),
        ({"undesirable_weight": 1.2}, "kto"),
        ({"center_rewards_coefficient": 0.01}, "rm"),
    ],
)
def test_trl_s_options_tell_the_stage(options: dict[str, Any], stage: str, tmp_path: Path) -> None:
    without = {name: value for name, value in TRL.items() if name != "stage"}
    assert values(tmp_path, without | options).stage == stage


def test_the_list_for_users_has_every_option(tmp_path: Path) -> None:
    options = LLAMA_FACTORY | {"stage": "sft", "packing": True, "use_dora": True, "bf16": True}
    text = "\n".join(report(translation(given(tmp_path, options))))
    for name in ("packing", "use_dora", "bf16", "do_train", "cutoff_len", "per_device_train_batch_size"):
        assert f" {name}: " in text
    assert "differs      packing" in text
