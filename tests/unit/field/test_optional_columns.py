"""Columns that LLaMA-Factory's registry names and that single records may lack."""

from __future__ import annotations

import pytest

from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

BARE = {"instruction": "Describe it.", "chosen": "Small.", "rejected": "No."}
COLUMNS = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
TALK = {"conversations": [{"from": "human", "value": "Describe it."}], "chosen": "Small.", "rejected": "No."}
TALK_COLUMNS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
TURNS = {"prompt": "Describe it.", "chosen": [{"role": "assistant", "content": "Small."}], "rejected": "No."}
TOOL = {"type": "function", "function": {"name": "tide"}}
SHOWS = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ mood or '' }}" + NAMED["chatml"].jinja
VALUES = {
    "query": ("hint", "Use few words.", "Use few words."),
    "system": ("sys", "Be kind.", "Be kind."),
    "history": ("past", [["Hi", "Hello"]], "Hello"),
    "tools": ("tls", [TOOL], "tide"),
    "chat_template_kwargs": ("vars", {"mood": "calm"}, None),
    "chosen_score": ("cs", 3.5, None),
    "rejected_score": ("rs", 1.5, None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml", SHOWS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("first", [True, False])
def test_some_records_may_lack_it(tmp_path, model, key, first):
    name, value, text = VALUES[key]
    records = [BARE | {name: value}, BARE]
    entry = {"columns": COLUMNS | {key: name}}
    result = read(tmp_path, model, records if first else records[::-1], entry=entry)
    assert result.exit_code == 0 and len(result.texts) == 2, result.said
    shown = [text is not None and text in prompt for prompt, *_ in result.texts]
    assert sorted(shown) == [False, text is not None] and result.notes == {}


@pytest.mark.parametrize("key", VALUES)
def test_all_records_lacking_it_is_an_error(tmp_path, model, key):
    result = read(tmp_path, model, [BARE, BARE], entry={"columns": COLUMNS | {key: "elsewhere"}}, max_refused=1.0)
    assert result.exit_code == 65 and "elsewhere" in result.said and f"columns.{key}" in result.said


@pytest.mark.parametrize(("base", "columns"), [(BARE, COLUMNS), (TALK, TALK_COLUMNS)])
@pytest.mark.parametrize("key", ["system", "tools"])
def test_null_in_all_records_is_no_error(tmp_path, model, base, columns, key):
    assert read(tmp_path, model, [base | {"x": None}], entry={"columns": columns | {key: "x"}}).exit_code == 0


@pytest.mark.parametrize("key", [*VALUES, "images", "kto_tag"])
def test_empty_name_means_unset(tmp_path, model, key):
    result = read(tmp_path, model, [BARE], entry={"columns": COLUMNS | {key: ""}})
    assert result.exit_code == 0 and result.texts[0][1] == "Small.<|im_end|>", result.said


def test_required_columns_are_dropped_where_they_are_missing(tmp_path, model):
    lacking = {"instruction": "Describe it.", "rejected": "No."}
    result = read(tmp_path, model, [BARE, lacking], entry={"columns": COLUMNS}, max_refused=0.5)
    assert (result.exit_code, result.dropped) == (0, {"named_column_missing": 1})


@pytest.mark.parametrize("base", [TALK, TURNS])
def test_records_with_different_columns(tmp_path, model, base):
    system = base | {"system": "Be kind."}
    result = read(tmp_path, model, [base, system, base | {"tools": [TOOL]}, base | {"chosen_score": 2}])
    assert result.exit_code == 0, result.said
    assert ["Be kind." in prompt for prompt, *_ in result.texts] == [False, True, False, False]
    assert ["tide" in prompt for prompt, *_ in result.texts] == [False, False, True, False]
