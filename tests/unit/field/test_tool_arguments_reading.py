"""Tools and calls as OpenAI, LLaMA-Factory and JSON text write them."""

from __future__ import annotations

import json

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.record import to_example

BARE = {"name": "tide", "description": "Height of the tide", "parameters": {"type": "object"}, "strict": True}
WRAPPED = {"type": "function", "function": BARE, "extra": 1}
CALL = {"name": "tide", "arguments": {"at": "noon"}}
TEXT_CALL = {"name": "tide", "arguments": '{"at": "noon"}'}


def turns(calls):
    return [
        {"role": "user", "content": "Is it high?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2 m"},
    ]


def read(formatting="trl", **more):
    record = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Yes.", "rejected": "No.", **more}
    if formatting == "sharegpt":
        record = {
            "conversations": [{"from": "human", "value": "Hi"}],
            **{k: v for k, v in record.items() if k != "prompt"},
        }
    if formatting == "alpaca":
        record["prompt"] = "Hi"
    return to_example(record, formatting, {}, {}, False)


@pytest.mark.parametrize("formatting", ["trl", "sharegpt", "alpaca"])
@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        pytest.param([WRAPPED], [WRAPPED], id="openai"),
        pytest.param(json.dumps([WRAPPED]), [WRAPPED], id="json"),
        pytest.param([BARE], [{"type": "function", "function": BARE}], id="bare"),
        pytest.param(json.dumps([BARE, WRAPPED]), [{"type": "function", "function": BARE}, WRAPPED], id="bare-json"),
        pytest.param([json.dumps(WRAPPED)], [WRAPPED], id="list-of-json"),
        pytest.param(json.dumps(BARE), [{"type": "function", "function": BARE}], id="one-tool"),
        pytest.param([], None, id="none"),
        pytest.param("[]", None, id="none-json"),
        pytest.param(" ", None, id="blank"),
        pytest.param("{", "tools_not_json", id="broken"),
        pytest.param("tide", "tools_not_json", id="word"),
        pytest.param([3], "tools_not_list", id="number"),
        pytest.param(str([WRAPPED]), "python_repr", id="repr"),
    ],
)
def test_tools(formatting, tools, expected):
    if isinstance(expected, str):
        with pytest.raises(Dropped) as caught:
            read(formatting, tools=tools)
        assert caught.value.code == expected
    else:
        assert read(formatting, tools=tools).tools == expected


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        pytest.param(
            [{"id": "1", "type": "function", "function": CALL}],
            [{"id": "1", "type": "function", "function": CALL}],
            id="openai",
        ),
        pytest.param(
            [{"type": "function", "function": TEXT_CALL}],
            [{"type": "function", "function": TEXT_CALL}],
            id="text-stays",
        ),
        pytest.param([CALL], [{"type": "function", "function": CALL}], id="bare"),
        pytest.param(json.dumps([CALL]), [{"type": "function", "function": CALL}], id="json"),
        pytest.param([{"function": {"arguments": {"at": "noon"}}}], "call_without_name", id="no-name"),
        pytest.param(str([CALL]), "python_repr", id="repr"),
        pytest.param([3], "calls_not_list", id="number"),
        pytest.param("tide()", "calls_not_list", id="word"),
        pytest.param([], "not_text", id="no-call-and-no-content"),
    ],
)
def test_calls_of_a_message(calls, expected):
    if isinstance(expected, str):
        with pytest.raises(Dropped) as caught:
            read(prompt=turns(calls))
        assert caught.value.code == expected
    else:
        assert read(prompt=turns(calls)).prompt[1] == {"role": "assistant", "content": None, "tool_calls": expected}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ('{"enable_thinking": false, "mood": null}', {"enable_thinking": False, "mood": None}),
        ("", {}),
        ({}, {}),
        ("off", "bad_template_kwargs"),
        ([1], "bad_template_kwargs"),
        ({"messages": [1]}, "bad_template_kwargs"),
        ({"mood": ""}, {"mood": ""}),
        ("{'enable_thinking': False}", "python_repr"),
    ],
)
def test_template_kwargs(value, expected):
    if isinstance(expected, str):
        with pytest.raises(Dropped) as caught:
            read(chat_template_kwargs=value)
        assert caught.value.code == expected
    else:
        assert read(chat_template_kwargs=value).template_kwargs == expected
