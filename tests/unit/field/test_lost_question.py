"""A column that holds a part of prompt or reply is read, or refused by name with an entry that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsdpo.cli import main
from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read
from tests.helpers.tiny import save_model, tiny_llama_config
from tests.unit.data.conftest import make_tokenizer

SQL = {"chosen": "SELECT COUNT(*) FROM boats", "rejected": "SELECT * FROM boats"}
TEXT = {"prompt": "Describe the sea.", "chosen": "It is blue.", "rejected": "It is dry."}
TURNS = {
    "prompt": [{"role": "user", "content": "Describe the sea."}],
    "chosen": [{"role": "assistant", "content": "It is blue."}],
    "rejected": [{"role": "assistant", "content": "It is dry."}],
}
TALK = {
    "conversations": [{"from": "human", "value": "Describe the sea."}],
    "chosen": {"from": "gpt", "value": "It is blue."},
    "rejected": {"from": "gpt", "value": "It is dry."},
}
TOOL = {"type": "function", "function": {"name": "tide"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml", NAMED["chatml"].jinja).save_pretrained(folder)
    return folder


def said_entry(said: str) -> dict[str, dict[str, object]]:
    """The entry that a message shows."""
    start = said.index('{"described": {') if '{"described": {' in said else said.index('{"rows": {')
    return json.JSONDecoder().raw_decode(said[start:])[0]


REFUSED = [
    pytest.param({**SQL, "question": "How many boats?"}, ["question"], "How many boats?", id="question"),
    pytest.param({**SQL, "instruct": "x", "Question": "How many?"}, ["Question"], "How many?", id="capital"),
    pytest.param({**SQL, "frage": "Wie viele Boote?"}, ["frage"], "Wie viele Boote?", id="unknown-word"),
    pytest.param({**SQL, "source": "How many boats are there?"}, ["source"], "How many boats", id="long-source"),
    pytest.param({**SQL, "问题": "多少船"}, ["问题"], "多少船", id="chinese"),
    pytest.param({**SQL, "user_input": "How many boats?"}, ["user_input"], "How many boats?", id="user-input"),
    pytest.param({**SQL, "question": "boats"}, ["question"], "boats<", id="stands-in-the-answers-alone"),
    pytest.param(
        {**SQL, "input": "How many boats?", "rationale": "The first one counts them."},
        ["input; this"],
        "user\nHow many boats?<",
        id="a-name-before-a-guess",
    ),
    pytest.param({**TEXT, "system": "Answer in rhyme."}, ["system"], "Answer in rhyme.", id="system-text"),
    pytest.param({**TEXT, "system_prompt": "In rhyme."}, ["system_prompt"], "In rhyme.", id="system-prompt"),
    pytest.param({**TEXT, "input": "At noon."}, ["input"], "At noon.", id="input"),
    pytest.param({**TEXT, "context": "Tides are high."}, ["context"], "Tides are high.", id="context"),
    pytest.param({**TEXT, "history": [["Hi", "Hello"]]}, ["history"], "Hello", id="history"),
    pytest.param({**TURNS, "system_prompt": "In rhyme."}, ["system_prompt"], "In rhyme.", id="messages-system-prompt"),
    pytest.param({**TALK, "sysPrompt": "In rhyme."}, ["sysPrompt"], "In rhyme.", id="sharegpt-camel-case"),
    pytest.param({**TEXT, "chat_template_kwargs": {"a": 1}}, ["chat_template_kwargs"], "sea", id="kwargs-text"),
    pytest.param({**TEXT, "system": "In rhyme.", "input": "At noon."}, ["system", "input"], "In rhyme.", id="two"),
]


@pytest.mark.parametrize(("record", "names", "text"), REFUSED)
def test_column_is_refused_and_the_entry_shown_reads_it(tmp_path, model, record, names, text):
    refused = read(tmp_path / "refused", model, [record])
    assert refused.exit_code == 65 and "rows.jsonl:1" in refused.said
    assert all(name in refused.said for name in names)
    [(_, entry)] = said_entry(refused.said).items()
    assert entry.pop("file_name") == "rows.jsonl"
    pasted = read(tmp_path / "pasted", model, [record], entry=entry)
    assert pasted.exit_code == 0 and text in pasted.texts[0][0], pasted.said


def test_system_text_with_a_named_template_is_not_dropped(tmp_path, model):
    assert read(tmp_path, model, [{**TEXT, "system": "In rhyme."}], template="chatml").exit_code == 65


@pytest.mark.parametrize(
    ("record", "names"),
    [
        pytest.param({**TURNS, "images": ["sea.jpg"]}, ["images"], id="images"),
        pytest.param({**TURNS, "image": {"bytes": "x", "path": None}}, ["image"], id="image-object"),
        pytest.param({**TEXT, "video_path": "sea.mp4"}, ["video_path"], id="video"),
        pytest.param({**TURNS, "documents": [{"text": "Tides are high."}]}, ["documents"], id="documents"),
        pytest.param({**TURNS, "history": [["Hi", "Hello"]]}, ["history"], id="history-beside-messages"),
        pytest.param({**TEXT, "messages": [{"role": "user", "content": "Else."}]}, ["messages"], id="other-messages"),
        pytest.param({**TURNS, "response": "It is cold."}, ["response"], id="third-answer"),
        pytest.param({**TURNS, "functions": [TOOL], "images": ["sea.jpg"]}, ["functions", "images"], id="tools-images"),
    ],
)
def test_column_that_nothing_reads_must_be_ignored(tmp_path, model, record, names):
    refused = read(tmp_path / "refused", model, [record])
    assert refused.exit_code == 65 and "ignore_columns" in refused.said and all(name in refused.said for name in names)
    by_run = read(tmp_path / "by_run", model, [record], ignore_columns=names)
    assert by_run.exit_code == 0 and "Describe the sea." in by_run.texts[0][0] and by_run.notes == {}
    by_entry = read(tmp_path / "by_entry", model, [record], entry={"ignore_columns": names})
    assert by_entry.texts == by_run.texts


@pytest.mark.parametrize(
    ("record", "prompt", "notes"),
    [
        pytest.param({**TURNS, "system": "In rhyme."}, "system\nIn rhyme.", [], id="system-beside-messages"),
        pytest.param({**TURNS, "prompt_id": "8f3", "source": "us"}, "sea", ["prompt_id", "source"], id="ids"),
        pytest.param({**TEXT, "question": None, "input": "", "images": [], "tools": "[]"}, "sea", [], id="empty"),
        pytest.param({**TEXT, "\udc80": "1"}, "sea", ["?"], id="surrogate-in-a-name"),
        pytest.param({**TEXT, "question": "Describe  the sea."}, "sea", ["question"], id="says-the-same"),
        pytest.param(
            {**TURNS, "messages": TURNS["prompt"] + TURNS["chosen"]}, "sea", ["messages"], id="messages-say-the-same"
        ),
        pytest.param(
            {**TEXT, "messages": TURNS["prompt"] + TURNS["chosen"]}, "sea", ["messages"], id="messages-beside-text"
        ),
        pytest.param({**TEXT, "chosen_model": "a", "num_turns": 2}, "sea", ["chosen_model", "num_turns"], id="facts"),
        pytest.param({**TEXT, "task": "math", "user": "ann"}, "sea", ["task", "user"], id="labels"),
        pytest.param({**TEXT, "answer_a_score": 3, "Bewertung": "gut"}, "sea", ["Bewertung"], id="unknown-column"),
        pytest.param(
            {"chosen": "The sky is blue", "rejected": "The sky is red", "id": "7"}, "The sky is", ["id"], id="t"
        ),
    ],
)
def test_other_columns_are_read_or_counted(tmp_path, model, record, prompt, notes):
    result = read(tmp_path, model, [record, record])
    assert result.exit_code == 0, result.said
    assert prompt in result.texts[0][0]
    for name in notes:
        assert result.notes[f"with the column {name} not used"] == 2
        assert f"2 with the column {name} not used" in result.said


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (
            {**TURNS, "system": "In rhyme.", "prompt": [{"role": "system", "content": "In prose."}, *TURNS["prompt"]]},
            65,
        ),
        (
            {**TURNS, "system": "In  rhyme.", "prompt": [{"role": "system", "content": "In rhyme."}, *TURNS["prompt"]]},
            0,
        ),
        (
            {
                **TALK,
                "system": "In rhyme.",
                "conversations": [{"from": "system", "value": "Else"}, *TALK["conversations"]],
            },
            65,
        ),
        ({**TURNS, "system": "In rhyme.", "system_prompt": "In prose."}, 65),
        ({**TURNS, "system": "In rhyme.", "system_prompt": "In rhyme."}, 0),
    ],
)
def test_two_system_texts_are_not_chosen_from(tmp_path, model, record, code):
    result = read(tmp_path, model, [record], max_refused=1.0)
    assert result.exit_code == code
    assert code or result.texts[0][0].count("In rhyme.") == 1


def test_deep_nesting_is_no_traceback(tmp_path, model):
    deep: list[object] = []
    for _ in range(480):
        deep = [deep, deep[:0]]
    result = read(tmp_path, model, [TEXT, {**TEXT, "extra": deep}], max_refused=0.5)
    assert (result.exit_code, result.dropped) in ((0, {"not_json": 1}), (0, {})), result.said


def test_one_late_record_ends_the_preparation(tmp_path, model):
    result = read(tmp_path, model, [TEXT] * 150 + [{**TEXT, "system": "In rhyme."}, TEXT], max_refused=1.0)
    assert result.exit_code == 65 and "rows.jsonl:151" in result.said and '"system": "system"' in result.said


def test_ignored_column_that_no_record_has_is_reported(tmp_path, model):
    result = read(tmp_path, model, [TEXT], entry={"ignore_columns": ["imgaes"]})
    assert result.exit_code == 0 and result.notes == {"with the column imgaes, which ignore_columns names": 0}


def test_column_cannot_be_named_and_ignored(tmp_path, model):
    entry = {"columns": {"system": "sys"}, "ignore_columns": ["sys"]}
    assert read(tmp_path, model, [TEXT], entry=entry).exit_code == 64


def test_through_the_command_line(tmp_path, model, monkeypatch, capsys):
    """The message goes to stderr with exit code 65; its entry, or ignore_columns, makes the same command work."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", tiny_llama_config(vocab_size=512, max_position_embeddings=2048))
    for path in model.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    settings = {"model_name_or_path": "model", "dataset": "rows.jsonl", "dataset_dir": ".", "output_dir": "out"}
    Path("run.yaml").write_text(json.dumps({**settings, "train_batch_size": 1, "max_steps": 1}))
    record = {"question": "How many boats?", "system": "In SQL.", **SQL}
    Path("rows.jsonl").write_text("".join(f"{json.dumps(record)}\n" for _ in range(3)))
    assert main(["prepare", "run.yaml"]) == 65
    told = capsys.readouterr()
    assert "rows.jsonl:1" in told.err and "train data" not in told.out + told.err
    Path("dataset_info.json").write_text(json.dumps(said_entry(told.err)))
    assert main(["prepare", "run.yaml", "--dataset", "rows"]) == 0
    assert main(["prepare", "run.yaml", "--ignore_columns", "question,system"]) == 0
    assert main(["prepare", "run.yaml", "--ignore_columns", "question"]) == 65
