"""Which settings a checkpoint may be continued with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from dsdpo.checkpoint.identity import config_diff, refusal
from dsdpo.config.options import options
from dsdpo.config.schema import RunConfig, options_with

DOCS = Path(__file__).parents[3] / "docs" / "checkpoints.md"
FIELDS = set(RunConfig.model_fields)
PLACES = {"model_name_or_path": "m", "dataset": ["d"], "output_dir": "o"}


def dump(**changes: object) -> dict[str, object]:
    return RunConfig(**PLACES, **changes).model_dump(mode="json")


FREE = {
    "model_name_or_path",
    "adapter_name_or_path",
    "attn_implementation",
    "kernels",
    "deterministic",
    "gradient_checkpointing",
    "dataset_dir",
    "hub",
    "model_revision",
    "eval_dataset",
    "max_refused",
    "ignore_columns",
    "preprocessing_num_workers",
    "cache_dir",
    "max_tokens_per_row",
    "share_prefix",
    "reference",
    "deepspeed",
    "output_dir",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "save_every_forever",
    "async_save",
    "resume_from_checkpoint",
    "change_on_resume",
    "max_time",
    "hang_timeout",
    "start_timeout",
    "eval_steps",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "run_name",
    "plot_loss",
    "disable_tqdm",
    "template_date",
}
CONSENT = {
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "max_grad_norm",
}


def test_every_option_has_a_policy() -> None:
    assert set(options_with("free")) == FREE
    assert set(options_with("consent")) == CONSENT
    assert set(options_with("fixed")) == FIELDS - FREE - CONSENT


@pytest.mark.parametrize(
    "option", ["seed", "train_batch_size", "max_length", "template", "loss_type", "beta", "lora_rank"]
)
def test_what_changes_the_meaning_is_fixed(option: str) -> None:
    assert option in options_with("fixed")


def test_the_docs_list_the_same() -> None:
    text = DOCS.read_text()
    section = text[text.index("## What may change") : text.index("Anything else (seed")]
    free, consent = section.split("These may change if `change_on_resume` names them:")
    assert set(re.findall(r"\w+", free)) & FIELDS == set(options_with("free"))
    assert set(re.findall(r"\w+", consent)) & FIELDS == set(options_with("consent"))


def test_only_options_that_need_consent_can_be_named() -> None:
    for option in CONSENT:
        assert RunConfig(**PLACES, change_on_resume=[option]).change_on_resume == [option]
    for option in ("seed", "save_steps", "no_such_option"):
        with pytest.raises(ValidationError):
            RunConfig(**PLACES, change_on_resume=[option])
    assert options()["change_on_resume"].allowed == f"a list out of {', '.join(options_with('consent'))}"


def test_every_difference_is_told() -> None:
    saved = dump()
    assert config_diff(saved, dump(logging_steps=5, deepspeed="x.json"), []) == []
    found = config_diff(saved, dump(seed=1, learning_rate=0.5, beta=0.3), [])
    assert [line.split()[0] for line in found] == ["beta", "learning_rate", "seed"]
    assert "change_on_resume" in found[1] and "change_on_resume" not in found[0]
    assert config_diff(saved, dump(learning_rate=0.5), ["learning_rate"]) == []
    assert "in 3 points: beta was" in refusal("out/step-1", found)


def test_an_option_that_a_version_adds_was_its_default() -> None:
    saved = dump()
    del saved["beta"], saved["loss_weights"]
    assert config_diff(saved, dump(), []) == []
    assert config_diff(saved, dump(beta=0.3), []) == ["beta was 0.1, now it is 0.3"]


def test_an_option_that_this_version_lacks_counts_where_it_was_set() -> None:
    saved = dump() | {"old_one": None}
    assert config_diff(saved, dump(), []) == []
    [line] = config_diff(saved | {"old_one": 3}, dump(), [])
    assert line.startswith("old_one was 3, this version has no such option")
