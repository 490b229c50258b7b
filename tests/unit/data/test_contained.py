"""What was rendered contains what was said: reasoning, variables and exceptions, on examples."""

from __future__ import annotations

import pytest

from dsdpo.data.contained import CALLED_TOOLS, EARLIER_THOUGHTS, Side
from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example
from dsdpo.data.named_templates import NAMED
from dsdpo.data.templates import ExampleEncoder
from tests.unit.data.conftest import make_tokenizer

CHATML = NAMED["chatml"].jinja
QWEN3 = NAMED["qwen3"].jinja
USER = {"role": "user", "content": "Is it?"}


def encoded(template, chosen, prompt=(USER,), tools=None, **variables):
    """(decoded prompt, decoded chosen, notes), or the code for which it is dropped."""
    tokenizer = make_tokenizer("chatml", template)
    rejected = {"role": "assistant", "content": "No idea."}
    example = Example(list(prompt), ([chosen], [rejected]), (None, None), tools=tools, template_kwargs=variables)
    found = ExampleEncoder(tokenizer, "default").encode([example])[0]
    if isinstance(found, Dropped):
        return found.code
    return tokenizer.decode(found.prompt_ids), tokenizer.decode(found.completion_ids[0]), found.notes


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("thoughts", ["It ends in s.", "Yes.", "a"])
def test_reasoning_of_the_reply_must_be_written(key, thoughts):
    reply = {"role": "assistant", "content": "Yes.", key: thoughts}
    assert encoded(CHATML, reply) == "template_leaves_out"
    assert encoded(QWEN3, reply)[1] == f"<think>\n{thoughts}\n</think>\n\nYes.<|im_end|>"


def test_reasoning_alone_is_no_empty_reply():
    reply = {"role": "assistant", "content": "", "reasoning_content": "It ends in s."}
    assert encoded(CHATML, reply) == "template_leaves_out"
    assert encoded(QWEN3, reply)[1] == "<think>\nIt ends in s.\n</think>\n\n<|im_end|>"


@pytest.mark.parametrize("earlier", [{"content": "One.", "thinking": "Hm."}, {"content": "<think>Hm.</think>One."}])
def test_thoughts_of_earlier_turns_are_noted(earlier):
    prompt = [USER, {"role": "assistant", **earlier}, USER]
    text, _, notes = encoded(QWEN3, {"role": "assistant", "content": "Yes."}, prompt)
    assert "Hm." not in text and "One." in text and notes == (EARLIER_THOUGHTS,)


def test_reasoning_without_a_template_is_refused():
    reply = {"role": "assistant", "content": "Yes.", "reasoning_content": "It ends in s."}
    example = Example([USER], ([reply], [{"role": "assistant", "content": "No"}]), (None, None))
    assert ExampleEncoder(make_tokenizer("gpt2"), "none").encode([example])[0].code == "template_leaves_out"


def test_variables_of_the_record_reach_the_template():
    template = "{{ mood or 'calm' }}: " + CHATML
    reply = {"role": "assistant", "content": "Yes."}
    assert encoded(template, reply, mood="glad")[0].startswith("glad: ")
    assert encoded(template, reply)[0].startswith("calm: ")
    for taken in ("tools", "add_generation_prompt", "chat_template", "messages"):
        assert _refused(template, reply, taken)


def _refused(template, reply, taken):
    tokenizer = make_tokenizer("chatml", template)
    other = {"role": "assistant", "content": "No"}
    example = Example([USER], ([reply], [other]), (None, None), template_kwargs={taken: []})
    return ExampleEncoder(tokenizer, "default").encode([example])[0].code == "template_error"


@pytest.mark.parametrize(
    "broken",
    [
        "{{ messages[1].content.split()[7].x.y }}",
        "{{ {}['a'].b }}",
        "{{ 1 + messages[0].content }}",
        "{{ messages[0].content.nothing() }}",
        "{{ 1 // (messages | length - messages | length) }}",
        "{{ raise_exception('never these') }}",
        "{{ messages | items | list }}",
    ],
)
def test_any_exception_of_a_template_drops_the_record(broken):
    """Where it is raised for some conversations alone."""
    template = "{% if 'fragile' in messages[0].content %}" + broken + "{% endif %}" + CHATML
    reply = {"role": "assistant", "content": "Yes."}
    assert encoded(template, reply, [{"role": "user", "content": "fragile"}]) == "template_error"
    assert encoded(template, reply)[1] == "Yes.<|im_end|>"


def test_tools_that_an_earlier_call_names_are_noted():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    prompt = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    template = CHATML.replace(
        "message['content'] +", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    tool = {"type": "function", "function": {"name": "get_weather"}}
    other = {"type": "function", "function": {"name": "get_time"}}
    reply = {"role": "assistant", "content": "Cold."}
    assert encoded(template, reply, prompt, [tool])[2] == (CALLED_TOOLS,)
    assert encoded(template, reply, prompt, [tool, other]) == "template_leaves_out"


@pytest.mark.parametrize(
    ("text", "said", "holds"),
    [
        ("a  b\nc", "a b c", True),
        ('{"x": "a\\nb"}', "a\nb", True),
        ("\\u003cb\\u003e", "<b>", True),
        ('"\\u00e4"', "\u00e4", True),
        ("abc", "abd", False),
        ("", "a", False),
    ],
)
def test_white_space_and_escapes_of_json_do_not_count(text, said, holds):
    assert Side(text).holds(said) is holds


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}, True),
        ("a=1;b=two;", {"a": 1, "b": "two"}, True),
        ("a=1;", {"a": 1, "b": "two"}, False),
        ("a=True", {"a": True}, True),
        ("a=false", {"a": True}, False),
        ("a=1.5", {"a": [1.5]}, True),
    ],
)
def test_arguments_are_compared_parsed(text, value, holds):
    assert Side(text).holds_value(value) is holds
