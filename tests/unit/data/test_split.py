"""Held-out prompts: no prompt on both sides, as many examples as val_size asks for, the same ones each time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.config.schema import RunConfig
from dsdpo.data.order import keyed_hash
from dsdpo.data.prepare import open_prepared, prepare, summary
from dsdpo.data.shards import PreparedSet
from dsdpo.data.split import PROMPT_KEYS, held_out_groups, prompt_key
from dsdpo.errors import DataError


@settings(max_examples=200)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=40), st.data())
def test_the_number_held_out_is_as_close_as_one_more_or_less_group_allows(sizes, data) -> None:
    n = sum(sizes)
    asked = data.draw(st.integers(1, n - 1))
    keys = keyed_hash(np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes), seed=3)
    groups = held_out_groups(keys, asked)
    held = int(np.isin(keys, groups).sum())
    assert 0 < held < n and len(np.unique(groups)) == len(groups)
    others = [size for size, key in zip(sizes, keys[np.cumsum(sizes) - 1]) if key not in groups]
    if len(others) > 1:
        assert abs(held - asked) <= min(abs(held + size - asked) for size in others)
    if sizes.count(1) >= asked:
        assert held == asked


def test_keys_follow_what_is_asked_and_not_how_it_is_written() -> None:
    turns = [{"role": "user", "content": "Hi "}]
    assert prompt_key("Hi") == prompt_key(" Hi\n") == prompt_key(turns)
    others = [
        "Ho",
        "x" * 9999 + "y",
        "x" * 9999 + "z",
        [{"role": "system", "content": "Hi"}, *turns],
        [*turns, {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "1"}],
        "\ud83d",
    ]
    assert len({prompt_key(prompt) for prompt in [*others, "Hi"]}) == len(others) + 1


@pytest.fixture
def run(tmp_path, model_folder):
    """Settings of a run on 60 pairs of 20 prompts, of which every third is longer than max_length."""
    records = [
        {
            "prompt": f"{i % 20}: {'why? ' * (60 if i % 20 % 3 else 1)}",
            "chosen": f"a{i} " * (1 + i % 7),
            "rejected": "no",
        }
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "model_name_or_path": str(model_folder),
        "dataset": ["pairs.jsonl"],
        "dataset_dir": str(tmp_path),
        "output_dir": str(tmp_path / "runs/out"),
        "max_length": 64,
        "val_size": 0.2,
    }


def split(run, **changes) -> tuple[PreparedSet, PreparedSet]:
    config = RunConfig(**{**run, **changes})
    found = prepare(config, "train"), prepare(config, "eval")
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


def numbers(pairs: PreparedSet) -> list[int]:
    """Which records a split holds."""
    return [int(pairs.where(i).split(":")[1]) - 1 for i in range(len(pairs))]


def test_equal_prompts_are_on_one_side_however_they_are_cut(run) -> None:
    train, held = split(run)
    assert sorted(numbers(train) + numbers(held)) == list(range(60)) and len(held) == 12
    assert not {i % 20 for i in numbers(train)} & {i % 20 for i in numbers(held)}
    assert train.manifest["truncated"] > 0 and "12 of them in this split" in summary(held)
    assert numbers(split(run)[1]) == numbers(held) != numbers(split(run, seed=7)[1])
    example = held.example(3)
    assert example.prompt_ids.tolist() == PreparedSet(held.path).example(numbers(held)[3]).prompt_ids.tolist()
    assert np.array_equal(held.digests(np.arange(12)), PreparedSet(held.path).digests(np.array(numbers(held))))
    with pytest.raises(IndexError):
        held.example(12)


def test_what_groups_do_not_allow_is_told(run) -> None:
    held = split(run, val_size=4)[1]
    assert len(held) == 3 and "4 asked for" in summary(held)


def test_single_pairs_as_before(run) -> None:
    train, held = split(run, val_split="example", val_size=0.2)
    assert (len(train), len(held)) == (48, 12)
    assert {i % 20 for i in numbers(train)} & {i % 20 for i in numbers(held)}
    ours = split(run)
    assert len({pairs.fingerprint for pairs in (train, held, *ours)}) == 4
    assert train.fingerprint == f"{train.manifest['fingerprint']}-train-12-42", "what earlier versions wrote"


def test_one_prompt_cannot_be_split(run, tmp_path) -> None:
    lines = [json.dumps({"prompt": "why?", "chosen": f"a{i}", "rejected": "no"}) for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="val_split: example"):
        split(run)
    assert len(split(run, val_split="example")[1]) == 2


def test_the_index_is_prepared_before_it_is_opened(run) -> None:
    config = RunConfig(**run)
    assert prepare(RunConfig(**{**run, "val_size": 0.0}), "train")
    with pytest.raises(DataError, match="dsdpo prepare"):
        open_prepared(config, "train")
    split(run)
    assert len(open_prepared(config, "eval") or []) == 12


def test_a_set_of_an_earlier_version_is_split_by_its_token_ids(run, tmp_path) -> None:
    whole = prepare(RunConfig(**{**run, "val_size": 0.0, "max_length": 512}), "train")
    assert whole is not None
    (whole.path / PROMPT_KEYS).unlink()
    train, held = split(run, max_length=512)
    assert not {i % 20 for i in numbers(train)} & {i % 20 for i in numbers(held)} and len(held) == 12
    assert not list(Path(whole.path / "splits").glob(".*"))


def test_text_and_one_user_message_are_the_same_prompt(run, tmp_path) -> None:
    talk = {"prompt": [{"role": "user", "content": "0: why?"}]}
    talk |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    text = {"prompt": "0: why?", "chosen": "a", "rejected": "b"}
    others = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [text, *others]))
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk) + "\n")
    names = ["text.jsonl", "talk.jsonl"]
    for seed in range(6):
        train, held = split(run, dataset=names, seed=seed, val_size=4)
        places = [{pairs.where(i) for i in range(len(pairs))} for pairs in (train, held)]
        assert any({"text.jsonl:1", "talk.jsonl:1"} <= found for found in places)
