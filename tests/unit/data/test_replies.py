"""Records of supervised training and labelled answers: which words are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.field import Read, read
from tests.unit.data.conftest import make_tokenizer

END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}: {{ c.function.arguments|tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def part_user(text: str, **more: Any) -> dict[str, Any]:
    """As LLaMA-Factory's newer files have it."""
    return user([{"type": "text", "value": text}], **more)  # type: ignore[arg-type]


def part_bot(text: str, **more: Any) -> dict[str, Any]:
    return bot([{"type": "text", "value": text}], **more)  # type: ignore[arg-type]


DIALOGUE = [user("How deep is it?"), bot("Two miles."), user("And how wide?"), bot("Ten miles.")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tokenizer("chatml", CHATML).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def taught(tmp_path: Path, model: Path, record: Any, stage: str = "sft", **more: Any) -> Read:
    return read(tmp_path / "run", model, record if isinstance(record, list) else [record], stage=stage, **more)


@pytest.mark.parametrize(
    ("record", "learned"),
    [
        ({"messages": DIALOGUE}, ["Two miles.", "Ten miles."]),
        ({"messages": [*DIALOGUE, user("Bye")]}, ["Two miles.", "Ten miles."]),
        ({"messages": [*DIALOGUE[:3], bot("Ten.", train=False)]}, ["Two miles."]),
        ({"messages": [DIALOGUE[0], bot("Two.", weight=0), *DIALOGUE[2:]]}, ["Ten miles."]),
        ({"messages": [*DIALOGUE[:3], bot("Ten.", masked=True), user("Sure?"), bot("Yes.")]}, ["Two miles.", "Yes."]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ["Hello"]),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, ["3"]),
        ({"instruction": "Add", "output": "3", "history": [["Hi", "Hello"]]}, ["Hello", "3"]),
        ({"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}, ["Ten miles."]),
        ({"prompt": DIALOGUE[:1], "completion": DIALOGUE[1:]}, ["Two miles.", "Ten miles."]),
        ({"prompt": "How deep?", "completion": DIALOGUE[1:2]}, ["Two miles."]),
        ({"question": "q", "context": "c", "answer": "SELECT 1"}, ["SELECT 1"]),
        ({"instruction": "List two", "output": '["one", "two"]'}, ['["one", "two"]']),
        ({"instruction": "Count", "output": "[1, 2, 3]"}, ["[1, 2, 3]"]),
        ({"messages": [user("List none"), bot("[]")]}, ["[]"]),
        ({"messages": [part_user("Hi", loss_weight=0.0), part_bot("Hello", loss_weight=1.0)]}, ["Hello"]),
        ({"messages": [part_user("Hi"), part_bot("No", loss_weight=0.0), user("r"), bot("b")]}, ["b"]),
    ],
)
def test_the_replies_are_trained_and_nothing_else(tmp_path: Path, model: Path, record: Any, learned: list[str]) -> None:
    found = taught(tmp_path, model, record)
    assert found.learned == [["".join(f"{reply}{END}" for reply in learned)]]


def test_the_last_reply_alone(tmp_path: Path, model: Path) -> None:
    found = taught(tmp_path, model, {"messages": DIALOGUE}, mask_history=True)
    assert found.learned == [["Ten miles." + END]] and "Two miles." in found.texts[0][0]


def test_the_last_reply_of_each_of_several_dialogues(tmp_path: Path, model: Path) -> None:
    answers = [[bot("x"), user("r"), bot("y")], "z", [bot("u"), user("s"), bot("v"), user("t"), bot("w")]]
    record = {"prompt": [user("q")], "completions": answers}
    found = taught(tmp_path, model, record, mask_history=True)
    assert found.learned == [["y" + END, "z" + END, "w" + END]]


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_labelled_answers_are_not_trained_as_good_ones(tmp_path: Path, model: Path, name: str) -> None:
    record = {"prompt": "p", "completion": "c", name: False}
    assert dict(taught(tmp_path, model, record).dropped) == {} and taught(tmp_path / "b", model, record).exit_code == 65
    assert taught(tmp_path / "c", model, record, ignore_columns=[name]).exit_code == 0
    assert taught(tmp_path / "d", model, {**record, name: "city"}).exit_code == 0  # a class of the record


def test_calls_are_trained_and_their_results_are_not(tmp_path: Path, model: Path) -> None:
    call = bot("", tool_calls=[{"function": {"name": "gauge", "arguments": {"at": "sea"}}}])
    record = {"messages": [user("How deep?"), call, {"role": "tool", "content": "2 mi"}, bot("Two miles.")]}
    found = taught(tmp_path, model, record)
    assert found.learned == [[f'<tool_call>gauge: {{"at": "sea"}}</tool_call>{END}Two miles.{END}']]


def test_thoughts_and_calls_that_are_parts(tmp_path: Path, model: Path) -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "Let me look. "},
        {"type": "tool_call", "value": '{"name": "gauge", "arguments": {"at": "sea"}}'},
    ]
    record = {"messages": [user("How deep?"), {"role": "assistant", "content": parts}]}
    found = taught(tmp_path, model, record)
    call = '<tool_call>gauge: {"at": "sea"}</tool_call>'
    assert found.learned == [[f"<think>\nhm\n</think>\n\nLet me look. {call}{END}"]]
    late = [*parts, {"type": "text", "value": "And more."}]
    record = {"messages": [user("How deep?"), {"role": "assistant", "content": late}]}
    assert dict(read(tmp_path / "b", model, [record], stage="sft").dropped) == {"part_not_read": 1}


def test_several_answers_share_their_prompt(tmp_path: Path, model: Path) -> None:
    """Equal ones too: each counts."""
    found = taught(tmp_path, model, {"prompt": DIALOGUE[:1], "completions": ["Two.", [bot("Three.")], "Two."]})
    assert found.learned == [["Two." + END, "Three." + END, "Two." + END]] and len(found.texts[0]) == 4


@pytest.mark.parametrize(
    ("reply", "options", "learned"),
    [
        (bot("<think>\nhm\n</think>\n\nYes."), {"mask_thinking": True}, "Yes."),
        (bot("Yes.", reasoning_content="hm"), {"mask_thinking": True}, "Yes."),
        (bot("<think>hm</think>Yes."), {}, "<think>hm</think>Yes."),
        (
            bot("One. Two. Three.", train_detail=[{"begin_offset": 0, "end_offset": 4, "train": False}]),
            {},
            "Two. Three.",
        ),
        (bot("One. Two.", train_detail=[{"begin_offset": 0, "end_offset": 4, "train": True}]), {}, "One. Two."),
    ],
)
def test_what_is_masked(tmp_path: Path, model: Path, reply: Any, options: Any, learned: str) -> None:
    found = taught(tmp_path, model, {"messages": [user("Is it?"), reply]}, **options)
    assert found.learned[0][0].strip() == learned + END
    pair = {"prompt": [user("Is it?")], "chosen": [reply], "rejected": [bot("No idea.")]}
    of_pair = read(tmp_path / "pair", model, [pair], stage="dpo", **options)
    assert of_pair.learned[0] == [found.learned[0][0], "No idea." + END]


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"messages": [user("q"), bot("a", train=False)]}, "nothing_trained"),
        ({"messages": [user("q")]}, "no_reply_in_it"),
        ({"messages": [user("q"), bot(" ")]}, "empty_reply"),
        ({"messages": [user("q"), bot("a"), bot("b")]}, "roles_do_not_alternate"),
        ({"instruction": "q", "output": ["a", "b"]}, "pairs_not_replies"),
        ({"prompt": "p", "completion": []}, "nothing_trained"),
        ({"prompt": " ", "completion": "c"}, "empty_prompt"),
        ({"prompt": "", "completion": "c"}, "empty_prompt"),
        ({"messages": [user("q"), bot("a", train_detail=[{"begin_offset": 0, "end_offset": 9}])]}, "bad_train_detail"),
        ({"messages": [user("q"), bot("aa", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])]}, ""),
    ],
)
def test_what_cannot_be_trained_is_dropped_with_a_reason(tmp_path: Path, model: Path, record: Any, code: str) -> None:
    found = taught(tmp_path, model, record)
    assert found.exit_code == (65 if code else 0) and dict(found.dropped) == ({code: 1} if code else {})


def test_weights_of_replies_other_than_0_and_1_are_told(tmp_path: Path, model: Path) -> None:
    found = taught(tmp_path, model, {"messages": [user("q"), bot("a", weight=0.5)]})
    assert found.learned == [["a" + END]] and dict(found.notes) == {"with the key weight of a reply not used": 1}


def test_a_reply_that_is_cut_off_whole_is_dropped(tmp_path: Path, model: Path) -> None:
    turns = [user("q"), bot("a " * 40, train=False), user("r"), bot("b")]
    found = taught(tmp_path, model, {"messages": turns}, max_length=16, truncation_mode="keep_start")
    assert dict(found.dropped) == {"prompt_too_long": 1}
    turns = [user("q"), bot("a"), user("r " * 40), bot("b")]
    found = read(tmp_path / "b", model, [{"messages": turns}], stage="sft", max_length=16, truncation_mode="keep_start")
    assert found.learned == [["a" + END]]


def test_labelled_answers(tmp_path: Path, model: Path) -> None:
    """Of a dialogue, the last reply; its partner is the answer before it, of the first that of the second."""
    records = [{"messages": DIALOGUE, "label": True}]
    records += [{"prompt": [user(f"q{i}")], "completion": [bot(f"a{i}")], "label": i % 2} for i in range(3)]
    entry = {"columns": {"kto_tag": "label"}}
    found = taught(tmp_path, model, records[1:], "kto", entry=entry)
    assert found.learned == [[f"a{i}{END}", f"a{j}{END}"] for i, j in ((0, 1), (1, 0), (2, 1))]
    assert sorted(found.notes.values()) == [1, 2]
    found = read(tmp_path / "b", model, [records[0], {**records[0], "label": "no"}], stage="kto")
    assert found.learned == [["Ten miles." + END] * 2] * 2
    found = read(tmp_path / "c", model, [*records[1:], {**records[1], "label": "good"}], stage="kto", max_refused=0.5)
    assert dict(found.dropped) == {"bad_label": 1}
    found = read(tmp_path / "d", model, records[1:2], stage="kto")
    assert found.exit_code == 65
    marked = {"messages": [*DIALOGUE[:3], bot("Ten.", train=False)], "label": True}
    found = read(tmp_path / "e", model, [marked, *records[:1] * 2], stage="kto", max_refused=0.5)
    assert dict(found.dropped) == {"reply_not_trained": 1}


def test_the_mismatched_answer_keeps_its_mask(tmp_path: Path, model: Path) -> None:
    records = [
        {"messages": [user("q"), bot(text)], "label": True} for text in ("<think>hm</think>Yes.", "No.", "Maybe.")
    ]
    found = taught(tmp_path, model, records, "kto", mask_thinking=True)
    assert found.learned == [
        [f"{a}{END}", f"{b}{END}"] for a, b in (("Yes.", "No."), ("No.", "Yes."), ("Maybe.", "No."))
    ]
    assert found.texts[1][2] == f"<think>hm</think>Yes.{END}"


@pytest.mark.parametrize(
    ("stage", "record", "named"),
    [
        ("sft", {"prompt": "p", "chosen": "c", "rejected": "r"}, "stage dpo or rm"),
        ("dpo", {"messages": DIALOGUE}, "stage sft"),
        ("dpo", {"prompt": "p", "completion": "c", "label": True}, "stage kto"),
        ("kto", {"prompt": "p", "completion": "c"}, "stage sft"),
    ],
)
def test_records_of_another_stage_are_told_with_it(
    tmp_path: Path, model: Path, stage: str, record: Any, named: str
) -> None:
    found = taught(tmp_path, model, record, stage)
    assert found.exit_code == 65 and named in found.said


@pytest.mark.parametrize(("stage", "ranking"), [("sft", True), ("kto", True), ("pt", True), ("dpo", False)])
def test_an_entry_for_another_stage_is_a_config_error(tmp_path: Path, model: Path, stage: str, ranking: bool) -> None:
    found = taught(tmp_path, model, {"messages": DIALOGUE}, stage, entry={"ranking": ranking})
    assert found.exit_code == 64 and found.codes == ["dataset"]
