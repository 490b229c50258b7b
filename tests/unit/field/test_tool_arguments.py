"""Arguments of function calls, as OpenAI and LLaMA-Factory write them: an object, or its JSON text."""

from __future__ import annotations

import json

import pytest

from dsdpo.data.chat_template import ChatTemplate
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(call: str, content: str = "{{ m.content }}") -> str:
    calls = "{% for c in m.tool_calls or [] %}<call>" + call + "</call>{% endfor %}"
    return TOOLS + TURN.replace("%s", content + calls) + ASKS


ITEMS = template("{{ c.function.name }}: {% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}")
TOJSON = template("{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}")
JOINS = template("{{ c.function.name + ' ' + c.function.arguments }}")
PRINTS = template("{{ c.function.name }} {{ c.function.arguments }}")
EITHER = template("{% set a = c.function.arguments %}{{ c.function.name }} {{ a if a is string else a | tojson }}")
ADDS_CONTENT = template("{{ c.function.name }} {{ c.function.arguments | tojson }}", "{{ '' + m.content }}")
KNOWS_NULL = template(
    "{{ c.function.name }} {{ c.function.arguments | tojson }}", "{{ '(call)' if m.content is none else m.content }}"
)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
OSLO = {"city": "Oslo", "days": 2}


def record(arguments, content="", in_reply=False):
    call = {"role": "assistant", "content": content}
    call["tool_calls"] = [
        {"id": "abcdefgh1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    ]
    if arguments is ...:
        del call["tool_calls"][0]["function"]["arguments"]
    other = {"role": "assistant", "content": "No idea."}
    prompt = [{"role": "user", "content": "Oslo?"}]
    if in_reply:
        return {"prompt": prompt, "chosen": [call], "rejected": [other], "tools": [TOOL]}
    prompt += [call, {"role": "tool", "content": "4 degrees"}]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "Cold."}],
        "rejected": [other],
        "tools": [TOOL],
    }


WRITTEN = [
    (ITEMS, "<call>get_weather: city=Oslo;days=2;</call>"),
    (TOJSON, '<call>{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}</call>'),
    (JOINS, '<call>get_weather {"city": "Oslo", "days": 2}</call>'),
    (PRINTS, '<call>get_weather {"city": "Oslo", "days": 2}</call>'),
    (EITHER, '<call>get_weather {"city": "Oslo", "days": 2}</call>'),
    (ADDS_CONTENT, '<call>get_weather {"city": "Oslo", "days": 2}</call>'),
]


@pytest.mark.parametrize("in_reply", [False, True])
@pytest.mark.parametrize("arguments", [OSLO, json.dumps(OSLO)], ids=["object", "text"])
@pytest.mark.parametrize(("jinja", "written"), WRITTEN)
def test_objects_and_texts_are_written_alike(jinja, written, arguments, in_reply, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(jinja), [record(arguments, in_reply=in_reply)])
    assert found.exit_code == 0, found
    assert written in found.texts[0][1 if in_reply else 0]


@pytest.mark.parametrize(
    ("jinja", "content"),
    [(TOJSON, ""), (ADDS_CONTENT, ""), (KNOWS_NULL, "(call)"), (JOINS, ""), (ITEMS, "")],
)
def test_a_null_content_beside_calls_is_written_as_the_template_wants_it(jinja, content):
    messages = record(json.dumps(OSLO), None)["prompt"]
    text = ChatTemplate(make_tokenizer("chatml", jinja), None, "default", None).render(messages, [TOOL], True)
    assert f"<|im_start|>assistant\n{content}<call>" in text
    assert "None" not in text


def test_text_that_is_no_object_goes_to_the_template_as_it_is(tmp_path, model_of):
    found = read(tmp_path / "one", model_of(PRINTS), [record("Oslo, 2 days")])
    assert found.exit_code == 0 and "<call>get_weather Oslo, 2 days</call>" in found.texts[0][0]
    found = read(tmp_path / "two", model_of(ITEMS), [record("Oslo, 2 days")])
    assert (found.exit_code, found.dropped) == (65, {"template_error": 1})


def test_arguments_with_letters_that_json_escapes(tmp_path, model_of):
    arguments = {"city": 'A\u030alesund "north"', "note": "a\n<b> & 'c'"}
    for name, jinja in (("items", ITEMS), ("tojson", TOJSON), ("joins", JOINS)):
        found = read(tmp_path / name, model_of(jinja), [record(json.dumps(arguments), in_reply=True)])
        assert found.exit_code == 0, found


@pytest.mark.parametrize("arguments", [{}, "{}", None, "", " \n", "null", ...], ids=str)
def test_calls_without_arguments(arguments, tmp_path, model_of):
    """Null, no text and no key are written as an empty object is."""
    for name, jinja in (("items", ITEMS), ("tojson", TOJSON), ("joins", JOINS), ("prints", PRINTS)):
        found, empty = (
            read(tmp_path / f"{name}{i}", model_of(jinja), [record(some, in_reply=True)])
            for i, some in enumerate((arguments, {}))
        )
        assert found.exit_code == 0 and "get_weather" in found.texts[0][1], found
        assert found.texts == empty.texts and not any(word in found.texts[0][1] for word in ("None", "null"))


def test_a_named_template_knows_no_calls(tmp_path, model_of):
    found = read(tmp_path / "one", model_of(None), [record(OSLO)], template="chatml")
    assert (found.exit_code, found.dropped) == (65, {"no_tools_in_template": 1})


@pytest.mark.parametrize(("jinja", "written"), WRITTEN)
def test_a_text_that_quotes_the_arguments_as_python_prints_them(jinja, written, tmp_path, model_of):
    quoted = record(OSLO, in_reply=True)
    quoted["prompt"][0]["content"] = f"Call it with {OSLO}"
    found = read(tmp_path / "run", model_of(jinja), [quoted])
    assert found.exit_code == 0 and written in found.texts[0][1], found


def test_a_call_with_an_end_of_its_own_is_trained_with_it(tmp_path, model_of):
    ends = EITHER.replace("<|im_end|>", "{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}")
    ends = ends.replace("}}\n{% endfor %}", "}}{% endfor %}")
    found = read(tmp_path / "run", model_of(ends), [record(OSLO, in_reply=True)])
    assert found.exit_code == 0 and found.texts[0][1].endswith("</call><|endoftext|>"), found
