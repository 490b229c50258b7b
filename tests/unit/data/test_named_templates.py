"""Named templates write what the tokenizers' own templates write, where TRL ships those."""

from __future__ import annotations

import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.config.templates import NAMES
from dsdpo.data.chat_template import ChatTemplate
from dsdpo.data.named_templates import NAMED
from dsdpo.data.texts import ExampleTexts
from dsdpo.errors import ConfigError
from tests.parity.test_trl_chat_templates import TEMPLATES
from tests.unit.data.conftest import make_tokenizer
from tests.unit.export.test_exported_template import tokenizer_of

OWN = {
    "cohere": "cohere",
    "deepseek3": "deepseekv3",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "llama3": "llama3",
    "phi": "phi3",
    "phi3": "phi3",
    "qwen3": "qwen3",
}
WITHOUT_SYSTEM = {"gemma", "gemma2"}  # the families' own refuses a system message
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!\n\nHow are you?"},
    {"role": "user", "content": "The sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "And  the sea?"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
REPLY = [{"role": "assistant", "content": "It is green."}]
THOUGHT = [{"role": "assistant", "content": "It is green.", "reasoning_content": "Well."}]
THOUGHT_IN_CONTENT = [{"role": "assistant", "content": "<think>\nWell.\n</think>\n\nIt is green."}]
CONVERSATIONS = {
    "one turn": TURNS[:1],
    "several turns": TURNS,
    "answered": TURNS[:2],
    "all answered": TURNS + REPLY,
    "system": SYSTEM + TURNS[:1],
    "system, several turns": SYSTEM + TURNS,
    "system, answered": SYSTEM + TURNS + REPLY,
}


@pytest.mark.parametrize(
    ("name", "conversation"),
    [(n, c) for n in OWN for c in CONVERSATIONS if not (c.startswith("system") and n in WITHOUT_SYSTEM)],
)
def test_named_templates_are_those_of_their_families(name, conversation):
    messages = CONVERSATIONS[conversation]
    tokenizer = tokenizer_of(name)
    ours, theirs = (ChatTemplate(tokenizer, text, name, None) for text in (NAMED[name].jinja, TEMPLATES[OWN[name]]))
    for_reply = messages[-1]["role"] == "user"
    found, expected = (chat.render(messages, None, for_reply) for chat in (ours, theirs))
    if name == "deepseek3":
        expected = expected.removesuffix("<think>\n")  # newer ones open thoughts for a reply
    if name.startswith("phi") and not for_reply:
        expected = expected.removesuffix(str(tokenizer.eos_token))  # behind the end of the turn
    assert found == expected


@pytest.mark.parametrize("reply", [REPLY, THOUGHT, THOUGHT_IN_CONTENT])
@pytest.mark.parametrize("earlier", [REPLY, THOUGHT, THOUGHT_IN_CONTENT])
def test_qwen3_writes_thoughts_as_the_family_does(earlier, reply):
    tokenizer = tokenizer_of("qwen3")
    messages = [TURNS[0], *earlier, TURNS[2], *reply]
    ours, theirs = (ChatTemplate(tokenizer, text, "qwen3", None) for text in (NAMED["qwen3"].jinja, TEMPLATES["qwen3"]))
    assert ours.render(messages, None, False) == theirs.render(messages, None, False)
    off = {"enable_thinking": False}
    assert ours.render(messages[:3], None, True, off) == theirs.render(messages[:3], None, True, off)


GOLDEN = {
    "mistral": (
        "<s>[INST] Be brief.\n\nHello[/INST] Hi!\n\nHow are you?</s>[INST] The sky?[/INST]",
        " It is blue.</s>",
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hi!\n\nHow are you?<|im_end|><|im_start|>user<|im_sep|>The sky?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "It is blue.<|im_end|>",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi!\n\nHow are you?</s>\n"
        "<|user|>\nThe sky?</s>\n<|assistant|>\n",
        "It is blue.</s>\n",
    ),
    "vicuna": (
        "Be brief. USER: Hello ASSISTANT: Hi!\n\nHow are you?</s>USER: The sky? ASSISTANT:",
        " It is blue.</s>",
    ),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi!\n\nHow are you?</s>\n\n"
        "### Instruction:\nThe sky?\n\n### Response:\n",
        "It is blue.</s>\n\n",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_templates_that_nobody_ships(name):
    prompt, reply = GOLDEN[name]
    chat = ChatTemplate(tokenizer_of(name), NAMED[name].jinja, name, None)
    assert chat.render(SYSTEM + TURNS[:3], None, True) == prompt
    assert chat.render(SYSTEM + TURNS[:4], None, False) == prompt + reply


def test_the_table_holds_the_names_that_the_config_knows():
    assert tuple(NAMED) == NAMES


def test_a_family_s_tokens_must_be_there():
    for name in NAMES:
        needs_bos = "bos_token" in NAMED[name].jinja and name != "llama3"
        if NAMED[name].tokens or needs_bos:
            with pytest.raises(ConfigError, match="needs"):
                ExampleTexts(make_tokenizer("gpt2" if not needs_bos else "chatml"), name, None, None)


@pytest.mark.parametrize(
    ("template", "hint"), [("chatlm", "did you mean chatml"), ("qwen4", "did you mean qwen"), ("mine", ".jinja file")]
)
def test_an_unknown_name_says_what_there_is(template, hint):
    with pytest.raises(ValueError, match=hint):
        RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", template=template)


@pytest.mark.parametrize("template", ["my.jinja", "./folder", "org/name", "default", "none", *NAMES])
def test_what_a_template_may_be(template):
    assert RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", template=template).template == template


@pytest.mark.parametrize("day", ["2026-11-26", None])
def test_a_date_is_a_day(day):
    assert RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", template_date=day).template_date == day


@pytest.mark.parametrize("day", ["26 Nov 2026", "2026-13-01", "today"])
def test_other_dates_are_refused(day):
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", template_date=day)
