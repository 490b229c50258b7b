"""Every key of a message reaches the example and the template, whatever the format."""

from __future__ import annotations

import json

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.record import to_example
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

PRINTS_KEYS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for key, value in m.items() if key not in ['role', 'content'] %}[{{ key }}={{ value }}]{% endfor %}"
    "{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEYS = {"name": "Ann", "mood": "calm", "number": 5, "nested": {"a": ["b"]}, "weight": 0.5}
REPLY_KEYS = {"reasoning_content": "It ends in s.", "thinking": "Hm.", "reasoning": "So.", "unheard_of": "yes"}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"at": "noon"}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml", PRINTS_KEYS).save_pretrained(folder)
    return folder


def user(text="Is it high?", **keys):
    return {"role": "user", "content": text, **keys}


def bot(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def human(text="Is it high?", **keys):
    return {"from": "human", "value": text, **keys}


def gpt(text, **keys):
    return {"from": "gpt", "value": text, **keys}


def record(formatting, asked, replied):
    """A record whose user message has the keys `asked` and whose chosen reply has the keys `replied`."""
    turns = [user("Hi"), bot("Hello"), user(**asked)]
    if formatting == "trl":
        return {"prompt": turns, "chosen": [bot("Yes.", **replied)], "rejected": [bot("No.")]}
    if formatting == "trl whole":
        return {"chosen": [*turns, bot("Yes.", **replied)], "rejected": [*turns, bot("No.")]}
    if formatting == "trl text beside":
        return {
            "prompt": "Is it high?",
            "chosen": [user(**asked), bot("Yes.", **replied)],
            "rejected": [user(**asked), bot("No.")],
        }
    if formatting == "trl from":
        return {"prompt": [human(**asked)], "chosen": [gpt("Yes.", **replied)], "rejected": [gpt("No.")]}
    if formatting == "sharegpt":
        return {"conversations": [human(**asked)], "chosen": gpt("Yes.", **replied), "rejected": gpt("No.")}
    if formatting == "sharegpt openai":
        return {"messages": turns, "chosen": bot("Yes.", **replied), "rejected": bot("No.")}
    if formatting == "alpaca":
        history = [user("Is it high?", **asked), bot("Hello")]
        return {
            "instruction": "And now?",
            "history": history,
            "chosen": [bot("Yes.", **replied)],
            "rejected": bot("No."),
        }
    assert formatting == "cvalues"
    last = {"role": "assistant", "chosen_value": "Yes.", "rejected_value": "No."}
    asks = {"role": "user", "value": "Is it high?", **asked}
    return {"messages": [asks, last | {f"chosen_{key}": value for key, value in replied.items()}]}


FORMS = ("trl", "trl whole", "trl text beside", "trl from", "sharegpt", "sharegpt openai", "alpaca", "cvalues")


def example(formatting, asked, replied):
    return to_example(record(formatting, asked, replied), formatting.split()[0], {}, {}, False)


@pytest.mark.parametrize("formatting", FORMS)
def test_each_key_stays_in_its_message(formatting):
    made = example(formatting, KEYS, REPLY_KEYS)
    [asked] = [message for message in made.prompt if message["content"] == "Is it high?"]
    assert asked == user(**KEYS)
    assert made.completions == ([bot("Yes.", **REPLY_KEYS)], [bot("No.")])


@pytest.mark.parametrize("formatting", FORMS)
@pytest.mark.parametrize("key", [*KEYS, *REPLY_KEYS])
def test_a_key_more_is_another_example(formatting, key):
    """Each key in turn: an example without it differs, in prompt and in reply."""
    every = KEYS | REPLY_KEYS
    fewer = {name: value for name, value in every.items() if name != key}
    whole = example(formatting, every, every)
    assert example(formatting, fewer, every) != whole != example(formatting, every, fewer)


@pytest.mark.parametrize("formatting", FORMS)
def test_nulls_are_left_out(formatting):
    nulls = dict.fromkeys([*KEYS, *REPLY_KEYS, "tool_calls", "tool_call_id", "images"])
    assert example(formatting, nulls, nulls) == example(formatting, {}, {})


@pytest.mark.parametrize("formatting", FORMS)
def test_keys_reach_the_template(tmp_path, model, formatting):
    result = read(tmp_path, model, [record(formatting, KEYS, REPLY_KEYS)], entry={"formatting": formatting.split()[0]})
    assert result.exit_code == 0, result.said
    prompt, chosen, _ = result.texts[0]
    assert all(f"[{key}={value}]" in prompt for key, value in KEYS.items())
    assert all(f"[{key}={value}]" in chosen for key, value in REPLY_KEYS.items())


def test_pairs_that_differ_in_their_reasoning_alone_are_pairs(tmp_path, model):
    pair = {
        "prompt": [user()],
        "chosen": [bot("Yes.", thinking="By the moon.")],
        "rejected": [bot("Yes.", thinking="?")],
    }
    assert "By the moon." in read(tmp_path, model, [pair]).texts[0][1]


OLD_CALL = {"name": "tide", "arguments": '{"at": "noon"}'}


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        pytest.param(bot(None, function_call=OLD_CALL), 1, id="old-form"),
        pytest.param(bot("Let me see.", function_call=OLD_CALL), 1, id="old-form-beside-text"),
        pytest.param(bot("", function_call=json.dumps(OLD_CALL), tool_calls=[]), 1, id="old-form-as-text"),
        pytest.param({"role": "assistant", "tool_calls": [{"function": OLD_CALL}]}, 1, id="no-content"),
        pytest.param(bot("Yes.", function_call=None, tool_calls=None), 0, id="null"),
        pytest.param(bot("Yes.", function_call={"name": None, "arguments": None}), 0, id="filled-in"),
    ],
)
def test_calls_in_every_form(reply, calls):
    turns = [user(), bot("", function_call=OLD_CALL), {"role": "function", "name": "tide", "content": "2 m"}]
    made = to_example({"prompt": turns, "chosen": [reply], "rejected": [bot("No.")]}, "trl", {}, {}, False)
    assert [call["function"] for call in made.completions[0][0].get("tool_calls", [])] == [OLD_CALL] * calls
    assert made.prompt[1]["tool_calls"][0]["function"] == OLD_CALL and made.prompt[2]["role"] == "tool"
    assert not any("function_call" in message for message in (*made.prompt, *made.completions[0]))


def test_content_stays_none_beside_calls():
    turns = [
        user(),
        bot(None, tool_calls=CALLS),
        {"role": "tool", "content": "2 m", "tool_call_id": "c1", "name": "tide"},
    ]
    made = to_example({"prompt": turns, "chosen": [bot("Yes.")], "rejected": [bot("No.")]}, "trl", {}, {}, False)
    assert made.prompt == turns


@pytest.mark.parametrize(
    ("message", "code"),
    [
        pytest.param(
            user([{"type": "text", "text": "Is it "}, {"type": "text", "text": "high?", "image": None}]),
            None,
            id="parts",
        ),
        pytest.param(user(["Is it ", "high?"]), None, id="texts"),
        pytest.param(
            user(
                [{"type": "input_text", "text": "Is it "}, {"type": "output_text", "text": "high?", "annotations": []}]
            ),
            None,
            id="parts-of-responses",
        ),
        pytest.param(
            user([{"type": "image", "url": "sea.jpg"}, {"type": "text", "text": "?"}]), "message_with_media", id="image"
        ),
        pytest.param(user([{"type": "image_url", "image_url": {"url": "x"}}]), "message_with_media", id="image-url"),
        pytest.param(user([{"type": "input_audio", "input_audio": {}}]), "message_with_media", id="audio"),
        pytest.param(user([{"type": "text", "text": "?", "cache": "x"}]), "part_with_key", id="key-of-a-part"),
        pytest.param(user(images=["sea.jpg"]), "message_with_media", id="images-of-a-message"),
        pytest.param(user(**{"from": "human", "value": "Is it high?"}), None, id="both-spellings"),
        pytest.param({"role": "me", **human()}, "unknown_role", id="unknown-role"),
    ],
)
def test_parts_of_a_content(tmp_path, model, message, code):
    pair = {"prompt": [message], "chosen": [bot("Yes.")], "rejected": [bot("No.")]}
    if code is None:
        made = to_example(pair, "trl", {}, {}, False)
        assert made.prompt[0]["content"] == "Is it high?"
        return
    with pytest.raises(Dropped) as caught:
        to_example(pair, "trl", {}, {}, False)
    assert caught.value.code == code
    assert read(tmp_path, model, [pair], entry={"formatting": "trl"}).exit_code == 65


@pytest.mark.parametrize("keys", [{"content": "Else."}, {"role": "assistant"}])
def test_two_spellings_that_differ_are_refused(keys):
    with pytest.raises(Dropped) as caught:
        to_example({"conversations": [human(**keys)], "chosen": "Yes.", "rejected": "No."}, "sharegpt", {}, {}, False)
    assert caught.value.code == "message_says_two"


def test_function_call_messages_keep_their_keys():
    call = {"name": "tide", "arguments": {"at": "noon"}}
    turns = [
        human(),
        {"from": "function_call", "value": json.dumps(call), "mood": "calm"},
        {"from": "observation", "value": "2 m", "at": "noon"},
    ]
    made = to_example({"conversations": turns, "chosen": "Yes.", "rejected": "No."}, "sharegpt", {}, {}, False)
    wrapped = [{"type": "function", "function": call}]
    assert made.prompt[1:] == [
        bot("", mood="calm", tool_calls=wrapped),
        {"role": "tool", "content": "2 m", "at": "noon"},
    ]
