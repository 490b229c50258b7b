"""chat_template_kwargs of single records: each has its own, and what a template does not read is counted."""

from __future__ import annotations

import pytest

from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read

CHATML = NAMED["chatml"].jinja
MOODS = "{{ 'Mood: ' + mood + '\n' if mood is defined }}{{ days | join('+') if days }}" + CHATML
DATED = "{{ 'Day: ' + (date_string if date_string is defined else 'none') + '\n' }}" + CHATML


def record(**variables) -> dict:
    return {
        "prompt": [{"role": "user", "content": "Describe the boats."}],
        "chosen": [{"role": "assistant", "content": "Small."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        **({"chat_template_kwargs": variables} if variables else {}),
    }


def test_each_record_has_its_own(tmp_path, model_of):
    records = [record(mood="calm"), record(), record(mood="wild", days=[1, 2]), record(mood="calm")]
    found = read(tmp_path / "run", model_of(MOODS), records)
    starts = [texts[0].split("<|im_start|>")[0] for texts in found.texts]
    assert (
        found.exit_code == 0 and starts == ["Mood: calm\n", "", "Mood: wild\n1+2", "Mood: calm\n"] and not found.notes
    )


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_is_switched_for_single_records(thinking, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(CHATML), [record(enable_thinking=thinking), record()], template="qwen3")
    opened = [texts[0].endswith("<think>\n\n</think>\n\n") for texts in found.texts]
    assert found.exit_code == 0 and opened == [not thinking, False] and not found.notes
    assert [texts[1].startswith("<think>") for texts in found.texts] == [thinking, True]


def test_thoughts_in_a_reply_where_thinking_is_off(tmp_path, model_of):
    thinks = record(enable_thinking=False)
    thinks["chosen"][0]["reasoning_content"] = "They have one sail."
    found = read(tmp_path / "run", model_of(CHATML), [thinks, record()], template="qwen3", max_refused=0.5)
    assert (found.exit_code, found.dropped) == (0, {"prompt_differs": 1}), found


@pytest.mark.parametrize(
    ("template", "variables", "unread"),
    [
        (MOODS, {"moood": "calm"}, ["moood"]),
        (MOODS, {"mood": "calm", "day": 1}, ["day"]),
        (MOODS, {"oo": 1, "Mood": "calm"}, ["oo"]),  # the word of a text counts as read
        (CHATML, {"enable_thinking": False}, ["enable_thinking"]),
        ("none", {"enable_thinking": False}, ["enable_thinking"]),
        ("chatml", {"enable_thinking": False}, ["enable_thinking"]),
        ("qwen3", {"enable_thinkng": False}, ["enable_thinkng"]),
        (DATED, {"date_string": "1 May 2020"}, []),
    ],
)
def test_what_a_template_does_not_read_is_counted(template, variables, unread, tmp_path, model_of):
    named = template in ("none", "chatml", "qwen3")
    options = {"template": template} if named else {}
    found = read(tmp_path / "run", model_of(CHATML if named else template), [record(**variables), record()], **options)
    assert found.exit_code == 0 and list(found.notes.values()) == [1] * len(unread), found
    assert all(f" {name} " in note for name, note in zip(unread, found.notes)) and all(map(found.said.count, unread))


def test_a_record_may_have_a_day_of_its_own(tmp_path, model_of):
    found = read(tmp_path / "run", model_of(DATED), [record(date_string="1 May 2020"), record()],
                 template_date="2026-01-31")  # fmt: skip
    days = [texts[0].split("\n")[0] for texts in found.texts]
    assert found.exit_code == 0 and days == ["Day: 1 May 2020", "Day: 31 Jan 2026"]


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "strftime_now", "chat_template"])
def test_what_a_record_cannot_set(name, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(MOODS), [record(**{name: "x"}), record()], max_refused=0.5)
    code = "template_error" if name in ("strftime_now", "chat_template") else "bad_template_kwargs"
    assert (found.exit_code, found.dropped) == (0, {code: 1}), found
