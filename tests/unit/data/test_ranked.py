"""Rankings: several answers to a prompt, best first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example
from dsdpo.data.formats.detect import detect
from dsdpo.data.formats.record import to_example
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

USER = [{"role": "user", "content": "Hi"}]


def ranked(completions: Any, formatting: str = "ranked", columns: dict[str, str] | None = None, **more: Any) -> Example:
    return to_example({"prompt": "Hi", "completions": completions, **more}, formatting, columns or {}, {}, False)


def contents(example: Example) -> list[str]:
    return [answer if isinstance(answer, str) else answer[0]["content"] for answer in example.completions]


def test_the_order_counts_or_the_scores_do() -> None:
    assert contents(ranked(["a", "b", "c"])) == ["a", "b", "c"]
    example = ranked(["a", "b", "c", "d"], scores=[1, 3.5, 2, 3.5])
    assert contents(example) == ["b", "d", "c", "a"] and example.scores == (3.5, 3.5, 2.0, 1.0)
    assert contents(ranked(json.dumps(["a", "b"]), scores="[1, 2]")) == ["b", "a"]


@pytest.mark.parametrize(
    "answers",
    [["a", [{"role": "assistant", "content": "b"}]], [{"role": "assistant", "content": "a"}, "b"]],
)
def test_messages_and_texts_may_stand_beside_each_other(answers: list[Any]) -> None:
    example = ranked(answers)
    assert contents(example) == ["a", "b"] and example.prompt == USER
    assert ranked(answers, prompt=USER) == example


def test_answers_that_repeat_their_prompt_have_it_taken_off() -> None:
    example = ranked(["Hi a", "Hi b", "Hi c"])
    assert contents(example) == [" a", " b", " c"] and example.notes


@pytest.mark.parametrize(
    ("completions", "more", "code"),
    [
        (["a"], {}, "number_of_answers"),
        ([f"answer {i}" for i in range(17)], {}, "number_of_answers"),
        (["a", "b", "a"], {}, "same"),
        (["a", "b", " "], {}, "empty_rejected"),
        ([" ", "b"], {}, "empty_chosen"),
        (["a", "b"], {"scores": [1]}, "bad_score"),
        (["a", "b"], {"scores": [1, "x"]}, "bad_score"),
        (["a", "b"], {"scores": [1, None]}, "bad_score"),
        (["a", "b"], {"scores": [2, 2]}, "all_tied"),
        ("a, b", {}, "no_answers"),
        (["a", 5], {}, "not_text"),
    ],
)
def test_what_is_no_ranking_is_dropped_by_name(completions: Any, more: dict[str, Any], code: str) -> None:
    with pytest.raises(Dropped) as caught:
        ranked(completions, **more)
    assert caught.value.code == code


def test_alpaca_takes_more_than_two_outputs() -> None:
    record = {"instruction": "Hi", "output": ["a", "b", "c"], "points": [0, 1, 2]}
    assert detect(record, {}) == "alpaca"
    assert contents(to_example(record, "alpaca", {}, {}, False)) == ["a", "b", "c"]
    assert contents(to_example(record, "alpaca", {"scores": "points"}, {}, False)) == ["c", "b", "a"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml").save_pretrained(folder)
    return folder


def test_a_loss_of_pairs_is_told_before_anything_is_launched(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": "Hi", "completions": ["a", "b", "c"]}, {"prompt": "Ho", "completions": ["a", "b"]}]
    assert read(tmp_path / "a", model, rows, loss_type="plackett_luce").exit_code == 0
    for number, options in enumerate(({}, {"stage": "rm"})):
        found = read(tmp_path / str(number), model, rows, **options)
        assert found.exit_code == 65 and "rows.jsonl:1" in found.said
    assert read(tmp_path / "b", model, rows[1:]).exit_code == 0


def test_a_ranking_that_no_micro_batch_holds_is_told_too(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": "Hi", "completions": [f"{word} " * 12 for word in "abcdef"]}]
    options = {"loss_type": "all_pairs", "max_length": 32}
    assert read(tmp_path / "a", model, rows, **options, max_tokens_per_row=64).exit_code == 65
    assert read(tmp_path / "b", model, rows, **options, max_tokens_per_row=512).exit_code == 0
