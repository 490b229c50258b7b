"""Files and folders that `template` names: what is taken from each, and what is said where nothing can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dsdpo.data.named_templates import NAMED
from dsdpo.data.template_files import find_template
from dsdpo.errors import ConfigError
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

CHATML = NAMED["chatml"].jinja
MINE = "{{ 'Mine:\n' }}" + CHATML
TOOLS = "{{ 'Tools:' }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + CHATML.replace(
    "+ '<|im_end|>",
    "+ (message['tool_calls'][0].function.name + (message['tool_calls'][0].function.arguments | tojson)"
    " if message['tool_calls'] else '') + '<|im_end|>",
)
TOOL = {"type": "function", "function": {"name": "find_tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find_tide", "arguments": {"port": "Brest"}}}
RECORD = {
    "prompt": [{"role": "user", "content": "Describe the boats."}],
    "chosen": [{"role": "assistant", "content": "Small."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
WITH_TOOLS = {**RECORD, "tools": [TOOL], "chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]}


def listed(**templates: str) -> str:
    return json.dumps({"chat_template": [{"name": name, "template": text} for name, text in templates.items()]})


# name -> files of a folder whose default template is MINE
FOLDERS: dict[str, dict[str, str]] = {
    "settings": {"tokenizer_config.json": json.dumps({"chat_template": MINE})},
    "several in the settings": {"tokenizer_config.json": listed(tool_use=TOOLS, default=MINE)},
    "a file": {"chat_template.jinja": MINE},
    "a file before the settings": {"chat_template.jinja": MINE, "tokenizer_config.json": listed(default="no")},
    "further files": {"chat_template.jinja": MINE, "additional_chat_templates/tool_use.jinja": TOOLS},
    "a file called default": {"additional_chat_templates/default.jinja": MINE},
    "of a processor": {"chat_template.json": json.dumps({"chat_template": MINE})},
    "of a processor, several": {"chat_template.json": listed(default=MINE, tool_use=TOOLS), "config.json": "{}"},
    "settings before a processor": {
        "tokenizer_config.json": json.dumps({"chat_template": MINE}),
        "chat_template.json": json.dumps({"chat_template": "no"}),
    },
}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_records_without_tools_take_the_default_template(name, tmp_path, model_of):
    other = write(tmp_path / "other", FOLDERS[name])
    found = read(tmp_path / "run", model_of(None), [RECORD], template=str(other))
    assert found.exit_code == 0 and found.texts[0][0].startswith("Mine:\n<|im_start|>user\n"), found


@pytest.mark.parametrize("name", [name for name in FOLDERS if "tool_use" in str(FOLDERS[name])])
@pytest.mark.parametrize("own", [False, True])
def test_records_with_tools_take_the_template_for_them(own, name, tmp_path, model_of):
    """As apply_chat_template does; also where the model's own tokenizer has several."""
    other = write(tmp_path / "other", FOLDERS[name])
    template = find_template(str(other)).text
    model = model_of(template if own else None)
    found = read(tmp_path / "run", model, [WITH_TOOLS, RECORD], template="default" if own else str(other))
    assert found.exit_code == 0, found
    assert found.texts[0][0].startswith("Tools:find_tide") and "Brest" in found.texts[0][1]
    assert found.texts[1][0].startswith("Mine:\n")
    tokenizer = make_tokenizer("chatml", template)
    for record, texts in zip((WITH_TOOLS, RECORD), found.texts):
        asked = {"tools": record.get("tools"), "tokenize": False, "add_generation_prompt": True}
        assert tokenizer.apply_chat_template(record["prompt"], **asked) == texts[0]


@pytest.mark.parametrize("name", [name for name in FOLDERS if "processor" not in name])
def test_a_folder_is_read_as_transformers_reads_it(name, tmp_path):
    make_tokenizer("chatml").save_pretrained(tmp_path / "other")
    settings = json.loads((tmp_path / "other/tokenizer_config.json").read_text())
    files = dict(FOLDERS[name])
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = json.dumps(settings | json.loads(files["tokenizer_config.json"]))
    write(tmp_path / "other", files)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "other").chat_template
    found = find_template(str(tmp_path / "other")).text
    assert found == theirs or {"default": found} == theirs


@pytest.mark.parametrize("name", ["mine.j2", "mine.txt", "mine.jinja2", "mine.template", "chat_template.json"])
def test_a_file_of_any_name_is_a_template(name, tmp_path, model_of, monkeypatch):
    text = json.dumps({"chat_template": MINE}) if name.endswith(".json") else MINE
    write(tmp_path, {name: text})
    monkeypatch.chdir(tmp_path)
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], template=f"./{name}")
    assert found.exit_code == 0 and found.texts[0][0].startswith("Mine:\n<|im_start|>user\n"), found


@pytest.mark.parametrize(
    ("files", "template", "code"),
    [
        ({}, "nothing.j2", "template-missing"),
        ({}, "nothing.txt", "template-missing"),
        ({}, "./nothing/at/all", "template-missing"),
        ({}, "nobody/nothing", "template-model"),
        ({"other/config.json": "{}"}, "./other", "template-none"),
        ({"other/additional_chat_templates/tool_use.jinja": TOOLS}, "./other", "template-none"),
        ({"other/tokenizer_config.json": listed(rag="x", tool_use="y")}, "./other", "template-none"),
        ({"other/tokenizer_config.json": "[]"}, "./other", "template-none"),
        ({"mine.json": '{"a": 1}'}, "mine.json", "template-none"),
        ({"mine.jinja": ""}, "mine.jinja", "template-none"),
        ({"mine.jinja": b"\xff\xfe{\x00"}, "mine.jinja", "template-unreadable"),
        ({"other/tokenizer_config.json": "{"}, "./other", "template-unreadable"),
        ({"mine.j2": "{{ messages"}, "mine.j2", "template-renders-nothing"),
        ({"mine.txt": "Once upon a time."}, "mine.txt", "template-renders-nothing"),
    ],
)
def test_what_is_no_template_is_named(files, template, code, tmp_path, model_of, monkeypatch):
    write(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], template=template)
    assert (found.exit_code, found.codes) == (64, [code]) and template in found.said, found


def test_without_a_template_that_of_the_processor_is_named(tmp_path, model_of):
    model = model_of(None)
    write(model, {"chat_template.json": json.dumps({"chat_template": MINE})})
    found = read(tmp_path / "run", model, [RECORD])
    assert (found.exit_code, found.codes) == (64, ["no-template"]) and str(model / "chat_template.json") in found.said
    again = read(tmp_path / "again", model, [RECORD], template=str(model))
    assert again.exit_code == 0 and again.texts[0][0].startswith("Mine:\n"), again


def test_codes_of_what_a_tokenizer_lacks(tmp_path, model_of):
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], template="gemma")
    assert (found.exit_code, found.codes) == (64, ["template-tokens"])
    with pytest.raises(ConfigError) as caught:
        tokenizer = make_tokenizer("chatml", CHATML)
        tokenizer.eos_token = None
        from dsdpo.data.templates import ExampleEncoder

        ExampleEncoder(tokenizer, "default")
    assert [problem.code for problem in caught.value.problems] == ["tokenizer-eos"]


@pytest.mark.parametrize("system", [" ", "\n", " \n\t ", "\u3000"])
def test_a_default_system_of_white_space_is_none(system, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(CHATML), [RECORD], default_system=system)
    assert found.exit_code == 0 and found.texts[0][0].startswith("<|im_start|>user\n"), found


@pytest.mark.parametrize(
    ("own", "files", "starts", "code"),
    [
        (MINE, {}, "Mine:\n", None),
        ({"default": MINE, "tool_use": TOOLS}, {}, "Mine:\n", None),
        (None, {"chat_template.json": json.dumps({"chat_template": MINE})}, "Mine:\n", None),
        (None, {}, "", "template-none"),
    ],
)
def test_a_model_id_in_the_cache(own, files, starts, code, tmp_path, model_of, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, commit = tmp_path / "hub/models--org--name", "a" * 40
    make_tokenizer("chatml", own).save_pretrained(model / "snapshots" / commit)
    write(model, {"refs/main": commit, f"snapshots/{commit}/config.json": '{"model_type": "llama"}'})
    write(model / "snapshots" / commit, files)
    found = read(tmp_path / "run", model_of(None), [RECORD], template="org/name")
    assert found.codes == ([code] if code else []), found
    assert not found.texts or found.texts[0][0].startswith(starts)
