"""Which settings a checkpoint may be continued with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsdpo.checkpoint.identity import _WITH_CONSENT, MAY_CHANGE, differences, refusal
from dsdpo.config.schema import RunConfig

DOCS = Path(__file__).parents[3] / "docs" / "checkpoints.md"
FIELDS = set(RunConfig.model_fields)


def dump(**changes: object) -> dict[str, object]:
    return RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", **changes).model_dump(mode="json")


def test_both_lists_name_options_and_share_none() -> None:
    assert MAY_CHANGE | set(_WITH_CONSENT) <= FIELDS and not MAY_CHANGE & set(_WITH_CONSENT)


@pytest.mark.parametrize(
    "option", ["seed", "train_batch_size", "max_length", "template", "loss_type", "beta", "lora_rank"]
)
def test_what_changes_the_meaning_is_in_neither(option: str) -> None:
    assert option in FIELDS - MAY_CHANGE - set(_WITH_CONSENT)


def test_the_docs_list_the_same() -> None:
    text = DOCS.read_text()
    section = text[text.index("## What may change") : text.index("Anything else (seed")]
    named = set(re.findall(r"\w+", section)) & FIELDS - {"change_on_resume"}
    assert named == MAY_CHANGE - {"change_on_resume"} | set(_WITH_CONSENT)


def test_every_difference_is_told() -> None:
    saved = dump()
    assert differences(saved, dump(logging_steps=5, deepspeed="x.json"), []) == []
    found = differences(saved, dump(seed=1, learning_rate=0.5, beta=0.3), [])
    assert [line.split()[0] for line in found] == ["beta", "learning_rate", "seed"]
    assert "change_on_resume" in found[1] and "change_on_resume" not in found[0]
    assert differences(saved, dump(learning_rate=0.5), ["learning_rate"]) == []
    assert "in 3 points: beta was" in refusal("out/step-1", found)


def test_an_option_that_a_version_adds_was_its_default() -> None:
    saved = dump()
    del saved["beta"], saved["loss_weights"]
    assert differences(saved, dump(), []) == []
    assert differences(saved, dump(beta=0.3), []) == ["beta was 0.1, now it is 0.3"]


def test_an_option_that_this_version_lacks_counts_where_it_was_set() -> None:
    saved = dump() | {"old_one": None}
    assert differences(saved, dump(), []) == []
    [line] = differences(saved | {"old_one": 3}, dump(), [])
    assert line.startswith("old_one was 3, this version has no such option")
