"""Text that was rendered before is not rendered again."""

from __future__ import annotations

import pytest

from dsdpo.data.chat_template import ChatTemplate
from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read
from tests.parity.test_trl_chat_templates import ONLY_PARTS, TEMPLATES, tokenizer_for
from tests.unit.export.test_exported_template import tokenizer_of

CHATML = "<|im_start|>user\nDescribe the boats.<|im_end|>\n<|im_start|>assistant\n"
LLAMA2 = "<s>[INST] Describe the boats. [/INST]"


def pair(prompt, chosen="Small.", rejected="No."):
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers)))


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("template", "family", "record"),
    [
        ("chatml", "chatml", pair(CHATML, "Small.<|im_end|>\n", "No.<|im_end|>\n")),
        ("chatml", "chatml", pair(user(CHATML))),
        ("qwen", "chatml", pair(user("Describe this: <|im_start|>user"))),
        ("chatml", "chatml", pair(user("Hi"), CHATML + "Small.")),
        ("chatml", "chatml", pair([{"role": "system", "content": CHATML}, *user("Hi")])),
        ("llama2", "llama", pair(LLAMA2)),
        ("llama2", "llama", pair(user(LLAMA2))),
        ("llama3", "llama3", pair(user("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"))),
        ("default", "chatml", pair(user(CHATML))),
        ("chatml", "chatml", pair(user(LLAMA2))),
        ("chatml", "chatml", pair(user("<bos><start_of_turn>user\nHi<end_of_turn>\n"))),
        ("llama3", "llama3", pair(user("<|im_start|>system\nBe kind.<|im_end|>\n"))),
    ],
)
def test_markers_that_open_a_turn_are_refused(template, family, record, tmp_path, model_of):
    own = NAMED["chatml"].jinja if template == "default" else None
    found = read(tmp_path / "run", model_of(own, family), [record], template=template)
    assert (found.exit_code, found.dropped) == (65, {"already_rendered": 1}), found


@pytest.mark.parametrize("prompt", [CHATML, LLAMA2])
def test_rendered_text_is_taken_as_it_stands_without_a_template(prompt, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(None), [pair(prompt)], template="none")
    assert found.exit_code == 0 and found.texts[0][0] == prompt, found
    found = read(tmp_path / "own", model_of(NAMED["chatml"].jinja), [pair(prompt)])
    assert found.exit_code == 0 and found.texts[0][0] == prompt, found  # text is not wrapped by the tokenizer's own


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nWell.\n</think>\nYes.",
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        "What does [INST] mean?",
        "if a < b and c > d: print('<b>')",
        "USER: hello\nASSISTANT: hi",
        "### Instruction:\nDescribe the boats.",
    ],
)
def test_other_tags_are_text(text, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(None), [pair(user(text), f"{text} indeed")], template="chatml")
    assert found.exit_code == 0 and text in found.texts[0][0] and text in found.texts[0][1], found


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ONLY_PARTS])
def test_what_opens_a_turn_is_learned_of_every_template(name):
    """Of every family that TRL has a template for, the markers of its user turns, and none of thoughts or tools."""
    chat = ChatTemplate(tokenizer_for(TEMPLATES[name]), None, name, "2026-01-31")
    conversation = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}, *user("Three")]
    text = chat.render(conversation, None, for_reply=True)
    between = text.split("Two")[1].split("Three")[0]  # where one marker ends a reply and opens a turn, it is the end
    assert any(marker in between for marker in {*chat.openers, chat.end.token} - {None}), chat.openers
    assert not {"<think>", "</think>", "<tool_call>", "<tool_response>", "<tools>"} & chat.openers
    assert chat.end not in chat.openers


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("alpaca", "vicuna")])
def test_what_opens_a_turn_is_learned_of_every_named_template(name):
    assert ChatTemplate(tokenizer_of(name), NAMED[name].jinja, name, None).openers
