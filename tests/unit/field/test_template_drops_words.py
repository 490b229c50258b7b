"""A template that leaves out what the model is to learn: the record is dropped, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read

TRL = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations)), "chat_templates")
CHATML = NAMED["chatml"].jinja
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
STRIPS = TURN.replace("%s", "{{ m.content.split('</think>')[-1] }}") + ASKS
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
CALLS += "{{ c.function.arguments | tojson }}</call>{% endfor %}"
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
NAMES_ALONE = TOOLS + TURN.replace(
    "%s", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
)
WRITES_ALL = TOOLS + TURN.replace("%s", "{{ m.content or '' }}" + CALLS) + ASKS
NO_TOOLS = TURN.replace("%s", "{{ m.content or '' }}" + CALLS) + ASKS
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def called(name="get_weather", **arguments):
    return said("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def pair(prompt, chosen, rejected=None, **more):
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected or said("No idea.")], **more}


THOUGHT = said("<think>\nIt ends in s.\n</think>\nYes.")
LOST = {
    "thoughts are cut": (STRIPS, pair([user("Is it?")], THOUGHT)),
    "thoughts are cut of one side alone": (STRIPS, pair([user("Is it?")], said("Yes."), THOUGHT)),
    "short thoughts are cut": (STRIPS, pair([user("a?")], said("<think>a</think>a"))),
    "thoughts are cut and the prompt holds the same words": (
        STRIPS,
        pair([user("<think>It ends in s.</think> Yes. Is it?")], said("<think>It ends in s.</think> Yes.")),
    ),
    "a call is not written": (CHATML, pair([user("Oslo?")], called(city="Oslo"))),
    "arguments are not written": (NAMES_ALONE, pair([user("Oslo?")], called(city="Oslo"), tools=[TOOL])),
    "arguments of one letter are not written": (NAMES_ALONE, pair([user("n?")], called(n="s"), tools=[TOOL])),
    "numbers are not written": (NAMES_ALONE, pair([user("1?")], called(a=1), tools=[TOOL])),
    "tools are not written": (NO_TOOLS, pair([user("get_weather of Oslo?")], said("Cold."), tools=[TOOL])),
    "a call of an earlier turn is not written": (
        CHATML,
        pair([user("Oslo?"), called(city="Oslo"), {"role": "tool", "content": "4"}], said("Cold.")),
    ),
    "the system message is not written": (
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"),
        pair([{"role": "system", "content": "Be brief."}, user("Hi")], said("Hello")),
    ),
    "a system message of one letter is not written": (
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"),
        pair([{"role": "system", "content": "s"}, user("Hi")], said("Hello")),
    ),
    "a system message is not written that the user repeats": (
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"),
        pair([{"role": "system", "content": "Be brief, please."}, user("Be brief, please.")], said("Hello")),
    ),
    "only the last turns are written": (
        CHATML.replace("in messages %}", "in messages[-2:] %}"),
        pair([user("One?"), said("One."), user("Two?")], said("Two.")),
    ),
    "long texts are cut": (TURN.replace("%s", "{{ m.content[:40] }}") + ASKS, pair([user("Hi")], said("Hello " * 20))),
    "letters are changed": (TURN.replace("%s", "{{ m.content | lower }}") + ASKS, pair([user("Hi")], said("HELLO"))),
    "nothing of a reply is written": (
        TURN.replace("%s", "{{ m.content if m.role == 'user' or m.content|length > 15 }}") + ASKS,
        pair([user("Hi")], said("Hello")),
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_drops_the_record(name, tmp_path, model_of):
    template, record = LOST[name]
    found = read(tmp_path / "run", model_of(template), [record])
    assert (found.exit_code, found.dropped) == (65, {"template_leaves_out": 1}), found


TRL_LOSES = {
    "deepseek_r1_distill": pair([user("Is it?")], THOUGHT),
    "llama3": pair([user("Oslo?")], called(city="Oslo")),
    "phi3": pair([user("Oslo?")], said("Cold."), tools=[TOOL]),
    "gemma": pair([user("Oslo?")], called(city="Oslo")),
    "cohere2": pair([user("Oslo?")], said("Cold."), tools=[TOOL]),
}


@pytest.mark.parametrize("family", TRL_LOSES)
def test_templates_of_families_that_know_no_tools_or_thoughts(family, tmp_path, model_of):
    model = model_of((TRL / f"{family}.jinja").read_text(), "llama")
    found = read(tmp_path / "run", model, [TRL_LOSES[family]])
    assert (found.exit_code, found.dropped) == (65, {"template_leaves_out": 1}), found


KEPT = {
    "white space around texts": (
        TURN.replace("%s", "{{ m.content | trim }}") + ASKS,
        pair([user(" Hi\n")], said("\nYes. ")),
    ),
    "JSON's escapes": (
        TURN.replace("%s", "{{ m.content | tojson }}") + ASKS,
        pair([user('<b> & "x"\n\u00e4')], said("It's <i>.\n\tNo")),
    ),
    "escapes of ASCII": (
        TURN.replace("%s", "{{ m.content | tojson(ensure_ascii=true) }}") + ASKS,
        pair([user("\u00e4?")], said("\u6f22\u5b57")),
    ),
    "a system message in the first turn": (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        + "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ (s + ' ') if loop.first }}"
        + "{{ m.content }}<|im_end|>\n{% endfor %}"
        + ASKS,
        pair([{"role": "system", "content": "Be brief."}, user("Hi")], said("Yes.")),
    ),
    "one letter": (CHATML, pair([user("a")], said("a"), said("s"))),
    "thoughts that are written": (CHATML, pair([user("Is it?")], THOUGHT)),
    "calls and tools": (
        WRITES_ALL,
        pair([user("Oslo?")], called(city="Oslo", days=[1, 2.5, True, None]), tools=[TOOL]),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_written_in_another_way_is_kept(name, tmp_path, model_of):
    template, record = KEPT[name]
    found = read(tmp_path / "run", model_of(template), [record])
    assert (found.exit_code, dict(found.dropped), dict(found.notes)) == (0, {}, {}), found


def test_thoughts_of_earlier_turns_are_counted(tmp_path, model_of):
    model = model_of((TRL / "qwen3.jinja").read_text())
    records = [
        pair([user("1?"), said("<think>Hm.</think>One."), user(f"{n}?")], said("<think>Well.</think>Two."))
        for n in "23"
    ]
    found = read(tmp_path / "run", model, records)
    assert found.exit_code == 0 and list(found.notes.values()) == [2], found
    assert "Hm." not in found.texts[0][0] and "<think>\nWell.\n</think>\n\nTwo." in found.texts[0][1]


def test_a_prompt_that_changes_before_the_reply_has_a_reason_of_its_own(tmp_path, model_of):
    opens = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    found = read(tmp_path / "one", model_of(opens), [pair([user("Hi")], said("Yes."))])
    assert (found.exit_code, found.dropped) == (65, {"prompt_differs": 1})


def test_a_reply_may_begin_with_the_tag_that_the_prompt_opened(tmp_path, model_of):
    opens = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    found = read(
        tmp_path / "one", model_of(opens), [pair([user("Hi")], THOUGHT, said("<think>\nA guess.\n</think>\nNo."))]
    )
    assert found.exit_code == 0, found
    assert found.texts[0][0].endswith("<think>\n") and found.texts[0][1] == "It ends in s.\n</think>\nYes.<|im_end|>"


def test_an_empty_rejected_side_that_is_meant_stays_empty(tmp_path, model_of):
    record = {"prompt": [user("Hi")], "chosen": [said("Yes.")], "rejected": [said("")]}
    found = read(tmp_path / "one", model_of(CHATML), [record], entry={"allow_empty_rejected": True})
    assert found.exit_code == 0 and found.texts[0][2] == "<|im_end|>"
