"""Prompts that stand in their answers, too, are read once."""

from __future__ import annotations

import pytest

from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

END = "<|im_end|>"
ASKED = f"<|im_start|>user\nDescribe the sea.{END}\n<|im_start|>assistant\n"
RHYME = f"<|im_start|>system\nIn rhyme.{END}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml", NAMED["chatml"].jinja).save_pretrained(folder)
    return folder


def user(text="Describe the sea."):
    return {"role": "user", "content": text}


def system(text="In rhyme."):
    return {"role": "system", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


TEXTS = [
    pytest.param(pair("Q: a?\nA:", "Q: a?\nA: Yes.", "Q: a?\nA: No."), ["Q: a?\nA:", " Yes.", " No."], id="both"),
    pytest.param(pair("Q: a?\nA: ", "Q: a?\nA: Yes.", "Q: a?\nA: No."), ["Q: a?\nA: ", "Yes.", "No."], id="space"),
    pytest.param(
        pair("Q: a?\nA:\n", "Q: a?\nA: Yes.", "Q: a?\nA: No."), ["Q: a?\nA:", " Yes.", " No."], id="other-space"
    ),
    pytest.param(pair("\n\nQ: a?", "Q: a? Yes.", "Q: a? No."), ["\n\nQ: a?", " Yes.", " No."], id="lines-in-front"),
    pytest.param(pair("Q: a?", "Q: a? Yes.", "No."), ["Q: a?", "Q: a? Yes.", "No."], id="one-alone"),
    pytest.param(pair("Any", "Anything.", "Anyone."), ["Any", "Anything.", "Anyone."], id="part-of-a-word"),
    pytest.param(pair("海", "海很大。", "海很小。"), ["海", "很大。", "很小。"], id="no-spaces"),
]


@pytest.mark.parametrize(("record", "texts"), TEXTS)
def test_text_prompts_in_text_answers(tmp_path, model, record, texts):
    result = read(tmp_path, model, [record])
    prompt, chosen, rejected = texts
    assert result.texts == [[prompt, chosen + END, rejected + END]], result.said
    assert len(result.notes) == (record["chosen"] != chosen)


MESSAGES = [
    pytest.param(pair([user()], [user(), bot("Blue.")], [user(), bot("Dry.")]), ASKED, id="whole-dialogues"),
    pytest.param(
        pair([system(), user()], [user(), bot("Blue.")], [user(), bot("Dry.")]), RHYME + ASKED, id="system-in-prompt"
    ),
    pytest.param(
        pair([user()], [system(), user(), bot("Blue.")], [system(), user(), bot("Dry.")]),
        RHYME + ASKED,
        id="system-in-dialogues",
    ),
    pytest.param(
        pair([user()], [user("Describe the sea. "), bot("Blue.")], [user(), bot("Dry.")]), ASKED, id="space-in-messages"
    ),
    pytest.param(pair("Describe the sea.", [bot("Blue.")], [bot("Dry.")]), ASKED, id="text-beside-replies"),
    pytest.param(pair("Describe the sea.", bot("Blue."), bot("Dry.")), ASKED, id="text-beside-objects"),
    pytest.param(
        pair("Describe the sea.", [bot("Blue.")], [bot("Dry.")], system="In rhyme."),
        RHYME + ASKED,
        id="text-and-system",
    ),
    pytest.param(
        pair("Describe the sea. \n", [user(), bot("Blue.")], [user(), bot("Dry.")]), ASKED, id="space-in-text"
    ),
    pytest.param(
        pair("Describe the sea.", [system(), user(), bot("Blue.")], [system(), user(), bot("Dry.")]),
        RHYME + ASKED,
        id="text-beside-system",
    ),
    pytest.param(pair([user()], "Blue.", "Dry."), ASKED, id="messages-beside-texts"),
    pytest.param(pair([user()], "Describe the sea.\nBlue.", "Describe the sea.\nDry."), ASKED, id="messages-in-texts"),
    pytest.param(
        pair("Describe the sea.", *(f"\n\nHuman: Describe the sea.\n\nAssistant: {x}." for x in ("Blue", "Dry"))),
        ASKED,
        id="hh-beside-its-question",
    ),
    pytest.param(pair([], [user(), bot("Blue.")], [user(), bot("Dry.")]), ASKED, id="empty-prompt"),
    pytest.param(
        {"instruction": "Describe the sea.", "output": ["Describe the sea. Blue.", "Describe the sea. Dry."]},
        ASKED,
        id="alpaca",
    ),
    pytest.param(
        pair([user()], [user(), bot("Hi"), user("And?"), bot("Blue.")], [user(), bot("Hi"), user("And?"), bot("Dry.")]),
        f"{ASKED}Hi{END}\n<|im_start|>user\nAnd?{END}\n<|im_start|>assistant\n",
        id="more-shared-turns",
    ),
]


@pytest.mark.parametrize(("record", "prompt"), MESSAGES)
def test_messages_stand_once(tmp_path, model, record, prompt):
    result = read(tmp_path, model, [record])
    assert result.exit_code == 0, result.said
    [[asked, chosen, rejected]] = result.texts
    assert (asked, chosen.strip(), rejected.strip()) == (prompt, f"Blue.{END}", f"Dry.{END}")


@pytest.mark.parametrize(
    ("record", "code"),
    [
        pytest.param(pair("Q: a?", "Q: a?", "Q: a? No."), "empty_chosen", id="nothing-after-the-prompt"),
        pytest.param(pair("Q: a?", "Q: a? Yes.", "Q: a?\n"), "empty_rejected", id="rejected-is-the-prompt"),
        pytest.param(pair("Q: a?", "Q: a? Yes.", "Q: a? Yes."), "same", id="same-after-it"),
        pytest.param(
            pair("Else.", [user(), bot("Blue.")], [user(), bot("Dry.")]), "text_beside_messages", id="other-text"
        ),
        pytest.param(pair([user()], [user(), bot("Blue.")], [bot("Dry.")]), "several_replies", id="one-dialogue"),
        pytest.param(
            pair("Describe the sea.", [system("A"), user(), bot("Blue.")], [system("B"), user(), bot("Dry.")]),
            "two_system_messages",
            id="systems-differ",
        ),
        pytest.param(
            pair({"messages": "Hi"}, [bot("Blue.")], [bot("Dry.")]), "not_text_or_messages", id="object-around"
        ),
        pytest.param(
            pair([user("Else.")], [user(), bot("A")], [user(), bot("B")]), "several_replies", id="other-prompt"
        ),
        pytest.param(pair([user()], [user()], [user(), bot("Dry.")]), "one_begins_the_other", id="no-reply"),
    ],
)
def test_other_meanings_are_refused_by_name(tmp_path, model, record, code):
    result = read(tmp_path, model, [record])
    assert (result.exit_code, result.dropped) == (65, {code: 1}), result.said


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        pytest.param({"input": "Describe the sea."}, {"prompt": "input"}, id="input-as-prompt"),
        pytest.param(
            {"instruction": "In rhyme.", "input": "Describe the sea."},
            {"prompt": "input", "system": "instruction"},
            id="instruction-as-system",
        ),
        pytest.param(
            {"prompt": "In rhyme.", "question": "Describe the sea."},
            {"prompt": "question", "system": "prompt"},
            id="prompt-as-system",
        ),
    ],
)
def test_a_named_column_is_read_once(tmp_path, model, record, columns):
    entry = {"columns": {**columns, "chosen": "chosen", "rejected": "rejected"}}
    result = read(tmp_path, model, [{**record, "chosen": "Blue.", "rejected": "Dry."}], entry=entry)
    prompt = RHYME + ASKED if "system" in columns else ASKED
    assert result.texts == [[prompt, "Blue." + END, "Dry." + END]], result.said
