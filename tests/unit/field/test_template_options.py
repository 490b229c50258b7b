"""Where a template comes from, and options of the run that it cannot take."""

from __future__ import annotations

import json

import pytest

from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read

CHATML = NAMED["chatml"].jinja
RECORD = {
    "prompt": [{"role": "user", "content": "Describe the boats."}],
    "chosen": [{"role": "assistant", "content": "Small."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
WITH_SYSTEM = {**RECORD, "prompt": [{"role": "system", "content": "Be brief."}, *RECORD["prompt"]]}
REFUSES = (
    "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system messages here') }}{% endfor %}" + CHATML
)
FAILS = "{% for m in messages if m.role == 'system' %}{{ m.content.nothing.at_all }}{% endfor %}" + CHATML
IGNORES = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}", 1)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
)
ALTERNATES += "{% endif %}{% endfor %}" + CHATML


@pytest.mark.parametrize("template", [REFUSES, FAILS, IGNORES, ALTERNATES])
@pytest.mark.parametrize("records", [[RECORD] * 3, [WITH_SYSTEM, RECORD]], ids=["all", "the second"])
def test_a_default_system_that_the_template_cannot_take_is_a_config_error(template, records, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(template), records, default_system="Be kind.")
    assert found.exit_code == 64 and "default_system" in found.said, found
    assert not list((tmp_path / "run/.dsdpo_cache/prepared").glob("*-*")), "something was encoded before"


@pytest.mark.parametrize("template", [REFUSES, FAILS, ALTERNATES])
def test_a_system_message_of_the_record_drops_the_record(template, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(template), [WITH_SYSTEM, RECORD], max_refused=0.5)
    assert (found.exit_code, found.dropped) == (0, {"template_error": 1}), found
    dropped = next((tmp_path / "run/.dsdpo_cache/prepared").glob("*/dropped_rows.jsonl")).read_text()
    assert any(words in dropped for words in ("no system messages here", "roles", "has no attribute"))


def test_a_default_system_that_fits_is_written(tmp_path, model_of):
    found = read(tmp_path / "run", model_of(CHATML), [RECORD, WITH_SYSTEM], default_system="Be kind.")
    assert found.exit_code == 0 and [("Be kind." in texts[0]) for texts in found.texts] == [True, False]


def test_a_template_from_a_file(tmp_path, model_of):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 'Mine:\n' }}" + CHATML)
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], template=str(file))
    assert found.exit_code == 0 and found.texts[0][0].startswith("Mine:\n<|im_start|>user\n")
    text = {"prompt": "Describe the boats.", "chosen": "Small.", "rejected": "No."}
    found = read(tmp_path / "text", tmp_path / "model", [text], template=str(file))
    assert found.texts[0][0].startswith("Mine:\n<|im_start|>user\nDescribe the boats.")


@pytest.mark.parametrize("as_list", [False, True, None])
def test_a_template_from_a_model_folder(as_list, tmp_path, model_of):
    other, text = tmp_path / "other", "{{ 'Mine:\n' }}" + CHATML
    other.mkdir()
    if as_list is None:
        (other / "chat_template.jinja").write_text(text)
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]
        (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": named if as_list else text}))
    found = read(tmp_path / "run", model_of(None), [RECORD], template=str(other))
    assert found.exit_code == 0 and found.texts[0][0].startswith("Mine:\n<|im_start|>user\n")


@pytest.mark.parametrize("template", ["./nothing.jinja", "./nothing", "nobody/nothing"])
def test_a_template_that_is_not_there(template, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], template=template)
    assert found.exit_code == 64 and template in found.said


def test_a_model_folder_without_a_template(tmp_path, model_of):
    (tmp_path / "other").mkdir()
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], template=str(tmp_path / "other"))
    assert found.exit_code == 64 and "chat template" in found.said


@pytest.mark.parametrize("name", ["mine.jinja", "chat_template.jinja"])
def test_a_byte_order_mark_is_no_part_of_a_template(name, tmp_path, model_of):
    (tmp_path / "other").mkdir()
    file = tmp_path / "other" / name
    file.write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    template = str(file if name == "mine.jinja" else file.parent)
    found = read(tmp_path / "run", model_of(None), [RECORD], template=template)
    assert found.exit_code == 0 and found.texts[0][0].startswith("<|im_start|>user\n"), found


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"chat_template": ["x"]}', b'{"a": "\xff"}'])
def test_a_model_folder_whose_settings_are_broken(content, tmp_path, model_of):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer_config.json").write_bytes(content)
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], template=str(tmp_path / "other"))
    assert found.exit_code == 64 and str(tmp_path / "other") in found.said, found


def test_a_default_system_that_a_template_for_text_cannot_take(tmp_path, model_of):
    (tmp_path / "mine.jinja").write_text(REFUSES)
    text = {"prompt": "Describe the boats.", "chosen": "Small.", "rejected": "No."}
    options = {"template": str(tmp_path / "mine.jinja"), "default_system": "Be kind."}
    found = read(tmp_path / "run", model_of(None), [text], **options)
    assert found.exit_code == 64 and "default_system" in found.said, found
