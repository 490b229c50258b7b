"""Columns under other names, in other languages and cases, and parts of the prompt inside of objects."""

from __future__ import annotations

import json

import pytest

from dsdpo.data.formats.names import part_of
from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

TEXT = {"prompt": "Describe the sea.", "chosen": "It is blue.", "rejected": "It is dry."}
USER = {"role": "user", "content": "Describe the sea."}
TURNS = {
    "prompt": [USER],
    "chosen": [{"role": "assistant", "content": "It is blue."}],
    "rejected": [{"role": "assistant", "content": "It is dry."}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml", NAMED["chatml"].jinja).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("initial_reason_steps", "First, look at it.", "initial_reason_steps"),
        ("response_prefix", "First, look at it.", "response_prefix"),
        ("systemprompt", "In rhyme.", "systemprompt"),
        ("系统提示词", "用韵文。", "系统提示词"),
        ("Réponse", "Elle est froide.", "Réponse"),
        ("extra_info", {"index": 3, "split": "train", "question": "How deep?"}, "extra_info.question"),
        ("extra_info", json.dumps({"question": "How deep?"}), "extra_info.question"),
        ("metadata", {"system": "In rhyme."}, "metadata.system"),
        ("meta", {"run": [{"sys_prompt": "In rhyme."}]}, "meta.run.sys_prompt"),
        ("metadata", {"tools": [{"name": "tide"}]}, "metadata.tools"),
        ("trajectory", [{"role": "user", "content": "How deep?"}], "trajectory"),
        ("info", {"run": [{"from": "human", "value": "How deep?"}]}, "info.run"),
    ],
)
def test_part_of_the_prompt_is_found_and_named(tmp_path, model, name, value, place):
    result = read(tmp_path / "one", model, [{**TURNS, name: value}])
    assert result.exit_code == 65 and f"does not read it: {place};" in result.said
    ignored = read(tmp_path / "two", model, [{**TURNS, name: value}], ignore_columns=[name])
    assert ignored.exit_code == 0 and ignored.notes == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_reason_steps", "It is"),
        ("steps", 12),
        ("extra_info", {"index": 3, "split": "train", "question": "Describe the sea.", "answer": "It is blue."}),
        ("extra_info", {"need_tools_kwargs": True, "tools_kwargs": {"calc": {"seed": 1}}}),
        ("metadata", {"task": "math", "user": "ann", "schema": "v2", "prompt_tokens": 4, "language": "en"}),
        ("metadata", {"system": None, "question": "", "run": "a"}),
        ("annotations", [{"text": "The first one is better."}]),
        ("feedback", {"text": "The first one is better."}),
        ("scores", {"output": "8", "helpfulness": 3}),
        ("trajectory", [USER]),
        ("messages", [json.dumps(USER), json.dumps(TURNS["chosen"][0])]),
        ("conversation", json.dumps({"messages": [USER, TURNS["rejected"][0]]})),
        ("target_lang", "de"),
        ("user_intent", "to learn about it"),
        ("generation_kwargs", {"temperature": 1}),
        ("tool_choice", "auto"),
        ("promptid", "p1"),
        ("问题类型", "科学"),
        ("systemFingerprint", "fp_1"),
    ],
)
def test_facts_about_the_record_are_counted(tmp_path, model, name, value):
    result = read(tmp_path, model, [{**TURNS, name: value}])
    assert result.exit_code == 0, result.said
    assert result.notes == {f"with the column {name} not used": 1}


@pytest.mark.parametrize(
    ("record", "formatting"),
    [
        ({"Prompt": "Describe the sea.", "Chosen": "It is blue.", "Rejected": "It is dry."}, "trl"),
        ({"PROMPT": [USER], "CHOSEN": TURNS["chosen"], "REJECTED": TURNS["rejected"]}, "trl"),
        ({"Instruction": "Describe the sea.", "Input": "", "Output": ["It is blue.", "It is dry."]}, "alpaca"),
        (
            {
                "Conversations": [{"from": "human", "value": "Describe the sea."}],
                "chosen": "It is blue.",
                "Rejected": {"from": "gpt", "value": "It is dry."},
            },
            "sharegpt",
        ),
        ({"Chosen": "\n\nHuman: sea.\n\nAssistant: It is blue.", "Rejected": "\n\nHuman: sea.\n\nAssistant: x"}, "hh"),
    ],
)
def test_usual_names_in_other_cases(tmp_path, model, record, formatting):
    result = read(tmp_path, model, [record] * 3)
    assert result.exit_code == 0 and f"({formatting}" in result.said
    assert "sea." in result.texts[2][0] and "It is blue." in result.texts[2][1]


def test_other_cases_do_not_hide_a_column(tmp_path, model):
    record = {"Prompt": "Describe the sea.", "Chosen": "It is blue.", "Rejected": "It is dry.", "System": "In rhyme."}
    assert "does not read it: System" in read(tmp_path / "a", model, [record]).said
    spelled_twice = {**TEXT, "Prompt": "Describe the moon."}
    assert "does not read it: Prompt" in read(tmp_path / "b", model, [spelled_twice]).said


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("userprompt", "prompt"), ("chathistory", "history"), ("inputText", "prompt"), ("SYSTEM", "system"),
        ("frage", "prompt"), ("pregunta", "prompt"), ("вопрос", "prompt"), ("質問", "prompt"), ("질문", "prompt"),
        ("模型回答", "reply"), ("对话历史", "history"), ("kontext", "context"), ("chosen_prefix", "reply"),
        ("template_kwargs", "chat_template_kwargs"), ("sampling_kwargs", None), ("userid", None), ("taskset", None),
        ("回答评分", None), ("texture", None), ("num_steps", None),
    ],
)  # fmt: skip
def test_words_of_names(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize("system", [[], {}, "", "[]", "null", [""]])
def test_system_that_holds_nothing_is_none(tmp_path, model, system):
    result = read(tmp_path, model, [{**TURNS, "system": system}])
    assert result.exit_code == 0 and "system" not in result.texts[0][0], result.said
