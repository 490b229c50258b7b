"""Messages in the forms that people have: parts, JSON texts, objects around them, other roles, marks for training."""

from __future__ import annotations

import json

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.detect import detect
from dsdpo.data.formats.record import to_example
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml", THINKS).save_pretrained(folder)
    return folder


def user(content="How deep?", **keys):
    return {"role": "user", "content": content, **keys}


def bot(content="Two miles.", **keys):
    return {"role": "assistant", "content": content, **keys}


def system(content="In rhyme.", **keys):
    return {"role": "system", "content": content, **keys}


NO = [bot("No.")]
PLAIN = {"prompt": [user()], "chosen": [bot()], "rejected": NO}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def thinking(text="By sonar.", **keys):
    return {"type": "thinking", "thinking": text, **keys}


def example(record, formatting=None):
    return to_example(record, formatting or detect(record, {}), {}, {}, False)


SAID = [
    pytest.param({**PLAIN, "prompt": [user(json.dumps(parts("How ", "deep?")))]}, id="parts-in-json"),
    pytest.param({**PLAIN, "prompt": [user(parts("How deep?")[0])]}, id="one-part"),
    pytest.param({**PLAIN, "chosen": [bot([{"type": "refusal", "refusal": "Two miles."}])]}, id="refusal"),
    pytest.param({**PLAIN, "chosen": json.dumps({"messages": [bot()]})}, id="json-around"),
    pytest.param({**PLAIN, "chosen": {"messages": [bot()]}, "rejected": {"messages": NO}}, id="object-around"),
    pytest.param({**PLAIN, "prompt": {"conversations": [user()], "id": 3}}, id="object-around-the-prompt"),
    pytest.param({**PLAIN, "prompt": json.dumps({"messages": [user()]}), "chosen": "Two miles."}, id="beside-text"),
    pytest.param({**PLAIN, "chosen": {"index": 0, "message": bot(), "finish_reason": "stop"}}, id="choice"),
    pytest.param(
        {side: json.dumps(json.dumps({"messages": [user(), bot(text)]})) for side, text in
         (("chosen", "Two miles."), ("rejected", "No."))},
        id="json-of-json-around",
    ),
    pytest.param({"conversations": {"messages": [user()]}, "chosen": bot(), "rejected": NO[0]}, id="around-sharegpt"),
    pytest.param({"instruction": "How deep?", "chosen": [bot()], "rejected": NO}, id="instruction-beside-messages"),
    pytest.param({key: [json.dumps(one) for one in value] for key, value in PLAIN.items()}, id="json-texts"),
    pytest.param({key: json.dumps([json.dumps(one) for one in value]) for key, value in PLAIN.items()},
                 id="json-of-json-texts"),
    pytest.param(
        {"conversations": [json.dumps({"from": "human", "value": "How deep?"})], "chosen": json.dumps(bot()),
         "rejected": NO[0]},
        id="json-texts-sharegpt",
    ),
    pytest.param(
        {"messages": [json.dumps(user()), json.dumps(
            {"role": "assistant", "chosen_value": "Two miles.", "rejected_value": "No."})]},
        id="json-texts-cvalues",
    ),
    pytest.param({**PLAIN, "chosen": [{"role": "model", "content": "Two miles."}]}, id="model"),
    pytest.param({"conversations": [user()], "chosen": {"role": "model", "content": "Two miles."}, "rejected": "No."},
                 id="model-sharegpt"),
    pytest.param({"conversations": user(), "chosen": bot(), "rejected": NO[0]}, id="one-message"),
    pytest.param({"conversations": [{"from": "human", "value": "How deep?"}], "chosen": bot(), "rejected": NO},
                 id="mix"),
    pytest.param({"conversations": {"from": ["human"], "value": ["How deep?"]}, "chosen": bot(), "rejected": "No."},
                 id="object-of-lists"),
    pytest.param(
        {side: {"role": ["user", "assistant"], "content": ["How deep?", text]} for side, text in
         (("chosen", "Two miles."), ("rejected", "No."))},
        id="objects-of-lists",
    ),
    pytest.param({**PLAIN, "prompt": [{"role": "user", "parts": [{"text": "How "}, {"text": "deep?"}]}],
                  "chosen": [{"role": "model", "parts": [{"text": "Two miles."}]}]}, id="gemini"),
    pytest.param({**PLAIN, "prompt": [{"role": "User", "content": "How deep?"}]}, id="capital-role"),
    pytest.param({**PLAIN, "prompt": [{"role": "human", "content": "How deep?"}],
                  "chosen": [{"role": "ai", "content": "Two miles."}]}, id="human-and-ai"),
    pytest.param({"chosen": [user(id=1), bot()], "rejected": [user(id=2, created_at="now"), *NO]}, id="ids-differ"),
    pytest.param({"prompt": [user()], "chosen": [user(id=1), bot()], "rejected": [user(id=2), *NO]},
                 id="ids-beside-a-prompt"),
]  # fmt: skip


@pytest.mark.parametrize("record", SAID)
def test_plain_messages_are_read(record):
    made = example(record)
    assert [message["content"] for message in made.prompt] == ["How deep?"]
    assert made.completions == ([bot()], NO)
    assert {message["role"] for message in made.prompt} == {"user"}


def test_the_roles_of_other_houses():
    turns = [
        {"role": "developer", "content": "In rhyme."},
        user(),
        bot("", tool_calls=[{"name": "sonar", "arguments": {}}]),
        {"role": "ipython", "content": "2"},
    ]
    made = example({**PLAIN, "prompt": turns})
    assert [message["role"] for message in made.prompt] == ["system", "user", "assistant", "tool"]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    record = {"conversations": turns[:2], "chosen": bot(), "rejected": NO[0]}
    assert to_example(record, "sharegpt", {}, tags, False).prompt == [system(), user()]


THOUGHT = [
    pytest.param([bot([thinking(signature="x"), *parts("Two miles.")])], id="anthropic"),
    pytest.param([bot([{"type": "reasoning", "text": "By sonar."}, *parts("Two miles.")])], id="reasoning-part"),
    pytest.param([bot(json.dumps([thinking(), *parts("Two miles.")]))], id="in-json"),
    pytest.param([bot([thinking(), *parts("Two miles.")], reasoning_content="By sonar.")], id="twice-the-same"),
    pytest.param([bot(reasoning_content=["By sonar."])], id="list"),
    pytest.param([bot(reasoning_content=[thinking()])], id="list-of-a-part"),
    pytest.param([bot(reasoning_content={"text": "By sonar."})], id="object"),
    pytest.param([bot("", reasoning_content="By sonar.")], id="no-content"),
    pytest.param([bot(None, reasoning_content="By sonar.")], id="null-content"),
    pytest.param([bot([thinking()])], id="thoughts-alone"),
]


@pytest.mark.parametrize("chosen", THOUGHT)
def test_thoughts_in_every_form(tmp_path, model, chosen):
    result = read(tmp_path, model, [{**PLAIN, "chosen": chosen}])
    assert result.exit_code == 0, result.said
    text = "Two miles." if chosen[0]["content"] and "Two" in str(chosen[0]["content"]) else ""
    assert result.texts[0][1] == f"<think>By sonar.</think>{text}<|im_end|>"


def test_thoughts_of_a_rejected_reply_without_content():
    assert example({**PLAIN, "rejected": [bot("", thinking="Hm.")]}).completions[1] == [bot("", thinking="Hm.")]


DROPPED = [
    ({**PLAIN, "chosen": [bot(train=False)]}, "reply_not_trained"),
    ({**PLAIN, "chosen": [bot(weight=0)]}, "reply_not_trained"),
    ({**PLAIN, "rejected": [bot("No.", weight="0.0")]}, "reply_not_trained"),
    ({"conversations": [user()], "chosen": bot(loss=False), "rejected": NO[0]}, "reply_not_trained"),
    ({**PLAIN, "rejected": [bot("No.", masked=True)]}, "reply_not_trained"),
    ({"messages": [user(), {"role": "assistant", "chosen_value": "a", "rejected_value": "b", "weight": 0}]},
     "reply_not_trained"),
    ({**PLAIN, "chosen": [bot(is_trained=False)]}, "reply_not_trained"),
    ({**PLAIN, "chosen": [bot(loss_mask=0)]}, "reply_not_trained"),
    ({**PLAIN, "chosen": [bot(reasoning=["One.", "Two."])]}, "not_text"),
    ({**PLAIN, "chosen": [bot(thinking={"steps": ["One."]})]}, "not_text"),
    ({**PLAIN, "chosen": [bot([*parts("Two"), thinking()])]}, "part_not_read"),
    ({**PLAIN, "chosen": [bot([{"type": "tool_use", "name": "sonar", "input": {}}])]}, "part_not_read"),
    ({**PLAIN, "chosen": [bot([thinking(), *parts("Two")], reasoning="Else.")]}, "message_says_two"),
    ({**PLAIN, "prompt": [user(json.dumps([*parts("Hi"), {"type": "image_url", "image_url": {"url": "x"}}]))]},
     "message_with_media"),
    ({**PLAIN, "prompt": [user(str(parts("How deep?")))]}, "python_repr"),
    ({**PLAIN, "prompt": [user(json.dumps(parts("How deep?"))[:-4])]}, "messages_not_json"),
    ({**PLAIN, "prompt": str({"messages": [user()]}), "chosen": "Two", "rejected": "No."}, "python_repr"),
    ({**PLAIN, "prompt": json.dumps({"messages": [user()]})[:-6], "chosen": "a", "rejected": "b"}, "messages_not_json"),
    ({**PLAIN, "prompt": {"messages": [user()], "system": "In rhyme."}}, "wrapper_with_keys"),
    ({**PLAIN, "prompt": {"messages": [user()], "tools": [{"name": "sonar"}]}}, "wrapper_with_keys"),
    ({"chosen": [user(name="Ann"), bot()], "rejected": [user(name="Bo"), *NO]}, "turns_differ"),
    ({"chosen": [system("A"), user(), bot()], "rejected": [system("B"), user(), *NO]}, "two_system_messages"),
    ({"prompt": [system("A"), user()], "chosen": [system("B"), user(), bot()], "rejected": [user(), *NO]},
     "two_system_messages"),
    ({**PLAIN, "prompt": [system("A"), user()], "system": "B"}, "two_systems"),
    ({**PLAIN, "prompt": [system(), user(tools=[{"name": "sonar"}])]}, "tools_in_message"),
    ({**PLAIN, "chosen": [bot(tools=[{"name": "sonar"}])]}, "tools_in_message"),
    ({**PLAIN, "prompt": [system(tools=[{"name": "sonar"}]), user()], "tools": [{"name": "radar"}]}, "two_tools"),
    ({**PLAIN, "tools": {"sonar": {"description": "Measures depth."}}}, "tool_without_name"),
    ({**PLAIN, "tools": [{"description": "Measures depth."}]}, "tool_without_name"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "code"), DROPPED)
def test_what_cannot_be_read_is_named(tmp_path, record, code):
    with pytest.raises(Dropped) as caught:
        example(record)
    assert caught.value.code == code


def test_marks_on_earlier_turns_and_marks_that_say_yes_change_nothing():
    turns = [user(), bot("What?", weight=0, train=False), user("The sea.", weight=0)]
    assert example({**PLAIN, "prompt": turns, "chosen": [bot(weight=1, train=True, loss_mask=1)]}).notes == ()
    assert len(example({**PLAIN, "chosen": [bot(weight=0.5)]}).notes) == 1


def test_json_that_is_an_answer_stays_text():
    for text in ('[{"type": "circle", "r": 2}]', '{"answer": 2}', '{"message": "sent"}', '["a"]', "[x] done", "[{'a'"):
        assert example({**PLAIN, "chosen": [bot(text)]}).completions[0] == [bot(text)]
        assert example({"prompt": "Hi", "chosen": text, "rejected": "No."}).completions[0] == text


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_of_the_first_message_are_those_of_the_record(key):
    tools = [{"type": "function", "function": {"name": "sonar"}}]
    made = example({**PLAIN, "prompt": [system(**{key: [{"name": "sonar"}]}), user()]})
    assert made.tools == tools and made.prompt == [system(), user()]
    made = example({**PLAIN, "prompt": [user(**{key: json.dumps(tools)})], "tools": tools, "system": "In rhyme."})
    assert made.tools == tools and made.prompt == [system(), user()]


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("prompt", "system"),
        ("prompt", "context"),
        ("prompt", "documents"),
        ("chosen", "thought"),
        ("chosen", "prefix"),
        ("chosen", "cot"),
    ],
)
def test_key_of_a_message_that_may_hold_words_is_rendered_or_the_record_dropped(tmp_path, model, place, key):
    record = {**PLAIN, place: [{**PLAIN[place][0], key: "By sonar."}]}
    assert read(tmp_path, model, [record]).dropped == {"template_leaves_out": 1}


def test_earlier_thoughts_and_labels_of_messages_may_be_left_out(tmp_path, model):
    turns = [user(user="ann"), bot("What?", thought="Hm."), user("The sea.", message_id="m1", prefix=True)]
    assert read(tmp_path, model, [{**PLAIN, "prompt": turns}]).exit_code == 0


@pytest.mark.parametrize(
    "value",
    [
        [system()],
        {"role": "developer", "content": "In rhyme."},
        json.dumps([system()]),
        json.dumps(system()),
        json.dumps(parts("In ", "rhyme.")),
        parts("In rhyme."),
    ],
)
def test_system_column_that_is_one_message(value):
    assert example({**PLAIN, "system": value}).prompt == [system(), user()]


@pytest.mark.parametrize("column", ["instruction", "input", "system"])
def test_messages_in_a_column_of_text_are_not_trained_as_json(column):
    record = {"instruction": "How deep?", "input": "", "output": ["Two miles.", "No."]}
    for value in (json.dumps([user(), bot(), user()]), json.dumps([bot()]), json.dumps(user(name="Ann"))):
        with pytest.raises(Dropped) as caught:
            example({**record, column: value})
        assert caught.value.code == "not_text"
    with pytest.raises(Dropped) as caught:
        example({**record, column: str([user(), bot()])})
    assert caught.value.code == "python_repr"
    for text in ('["a"]', '{"a": [1]}', '"quoted"', "(a)"):
        assert text in example({**record, column: text}).prompt[-1 if column != "system" else 0]["content"]


def test_empty_lists_stay_words_of_an_input():
    assert example({"instruction": "Sort.", "input": "[]", "output": ["[]", "No."]}).prompt == [user("Sort.\n[]")]
    assert example({"instruction": "Sort.", "input": [], "output": ["[]", "No."]}).prompt == [user("Sort.")]


TOOLS = [{"type": "function", "function": {"name": "sonar"}}]
PREFERRED = {"preferred_output": [bot()], "non_preferred_output": NO}


@pytest.mark.parametrize(
    ("given", "prompt", "tools", "notes"),
    [
        pytest.param({"messages": [user()]}, [user()], None, 0, id="plain"),
        pytest.param({"messages": [system(), user()], "tools": TOOLS}, [system(), user()], TOOLS, 0, id="tools"),
        pytest.param(
            {"messages": [user()], "tools": [], "parallel_tool_calls": True}, [user()], None, 1, id="a-switch"
        ),
        pytest.param(json.dumps({"messages": [user()], "tools": TOOLS}), [user()], TOOLS, 0, id="json"),
        pytest.param([user()], [user()], None, 0, id="list"),
        pytest.param("How deep?", [user()], None, 0, id="text"),
    ],
)
def test_openai(given, prompt, tools, notes):
    made = example({"input": given, **PREFERRED})
    assert (made.prompt, made.tools, len(made.notes)) == (prompt, tools, notes)
    assert made.completions == ([bot()], NO)
    written = {key: json.dumps(value) for key, value in PREFERRED.items()}
    assert example({"input": given, **written}) == made
    with_system = example({"input": given, **PREFERRED, "system": "In rhyme."})
    assert (with_system.prompt[0], with_system.tools) == (system(), tools)


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"input": {"messages": [user()], "system": "In rhyme."}, **PREFERRED}, "wrapper_with_keys"),
        ({"input": {"messages": [user()], "tools": TOOLS}, "tools": [{"name": "radar"}], **PREFERRED}, "two_tools"),
        ({"input": {"messages": [user()]}, **PREFERRED, "preferred_output": [bot(), bot()]}, "several_replies"),
        ({"input": {"messages": [user()]}, **PREFERRED, "preferred_output": [bot(weight=0)]}, "reply_not_trained"),
        ({"input": {"question": "How deep?"}, **PREFERRED}, "no_messages"),
        ({"input": None, **PREFERRED}, "column_missing"),
        ({"input": {"messages": [user()]}, "instruction": "In rhyme.", **PREFERRED}, "column_not_read"),
    ],
)
def test_openai_that_cannot_be_read_is_named(record, code):
    with pytest.raises(Dropped) as caught:
        example(record)
    assert caught.value.code == code


def test_openai_is_told_from_its_records(tmp_path, model):
    result = read(tmp_path, model, [{"input": {"messages": [system(), user()]}, **PREFERRED}])
    assert result.exit_code == 0 and "(openai)" in result.said
    assert "In rhyme." in result.texts[0][0] and result.texts[0][1:] == ["Two miles.<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "record",
    [
        {"chosen": {"messages": [user(), bot()]}, "rejected": {"messages": [user(), bot("No.")]}},
        {"prompt": [json.dumps(user())], "chosen": [json.dumps(bot())], "rejected": [json.dumps(bot("No."))]},
        {side: {key: [value] for key, value in message.items()} for side, message in
         (("prompt", user()), ("chosen", bot()), ("rejected", bot("No.")))},
    ],
)  # fmt: skip
def test_a_file_of_one_such_record_is_no_table_by_columns(tmp_path, model, record, name):
    content = json.dumps(record if name.endswith("l") else [record]).encode() + b"\n"
    result = read(tmp_path, model, content, name)
    assert [texts[1:] for texts in result.texts] == [["Two miles.<|im_end|>", "No.<|im_end|>"]]
