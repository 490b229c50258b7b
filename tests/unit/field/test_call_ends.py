"""Replies with calls that end with a token of their own: trained with it, and generation stops at it."""

from __future__ import annotations

import json

import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.data.exported import ExportedTemplate
from dsdpo.data.template_files import find_template
from dsdpo.data.templates import ExampleEncoder
from tests.helpers.field import read
from tests.parity.test_trl_chat_templates import TEMPLATES, tokenizer_for
from tests.unit.data.conftest import make_tokenizer

TOOL = {"type": "function", "function": {"name": "find_tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call00000", "type": "function", "function": {"name": "find_tide", "arguments": {"port": "Brest"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SAYS = {"role": "assistant", "content": "No idea."}
RECORD = {
    "prompt": [{"role": "user", "content": "When is high water?"}],
    "chosen": [CALLS],
    "rejected": [SAYS],
    "tools": [TOOL],
}


def template(after_call: str, after_calls: str = "", end: str = "<|im_end|>\n") -> str:
    """ChatML whose calls end as asked."""
    return (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
        "{% if message.tool_calls %}"
        "{% for call in message.tool_calls %}"
        "{{ '<|act|>' + call.function.name + (call.function.arguments | tojson) }}" + after_call + "{% endfor %}"
        f"{after_calls}"
        "{% else %}" + end + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


TOKENS = ("<|act|>", "<|call|>", "<|seen|>", "</act>", "<|im_over|>")
# template, the end of a call's completion, the tokens that end completions
ENDS = [
    (template("<|call|>"), "}<|call|>", ["<|im_end|>"]),  # stands between two calls, too: the record is dropped
    (template("", "<|call|>"), "}<|call|>", ["<|im_end|>", "<|call|>"]),
    (template("", "<|call|>\n"), "}<|call|>", ["<|im_end|>", "<|call|>"]),
    (template("</act>", "<|seen|>"), "}</act><|seen|>", ["<|im_end|>", "<|seen|>"]),
    (template("</act>\n", "\n<|seen|>"), "}</act>\n<|seen|>", ["<|im_end|>", "<|seen|>"]),
    (template("</act>", "<|im_end|>\n"), "}</act><|im_end|>", ["<|im_end|>"]),
    (template("", "<|seen|>", end="<|im_over|>"), "}<|seen|>", ["<|im_over|>", "<|seen|>"]),
    (template("", "<|seen|>", end=""), "}<|seen|>", ["<|im_end|>", "<|seen|>"]),  # texts end with EOS
    (template("", "", end=""), "}<|im_end|>", ["<|im_end|>"]),
]


@pytest.mark.parametrize(("text", "ends_with", "ends"), ENDS)
@pytest.mark.parametrize("has_tools", [True, False])
def test_calls_are_trained_with_their_own_end(has_tools, text, ends_with, ends, tmp_path, model_of):
    record = RECORD if has_tools else {key: value for key, value in RECORD.items() if key != "tools"}
    model = model_of(text, tokens=TOKENS)
    kept = ends_with.endswith(ends[-1])
    texts = {**RECORD, "chosen": [SAYS], "rejected": [{**SAYS, "content": "."}]}
    found = read(tmp_path / "run", model, [record, texts], max_refused=0.5)
    assert (found.exit_code, found.dropped) == (0, {} if kept else {"own_end": 1}), found
    if kept:
        assert found.texts[0][1].endswith('find_tide{"port": "Brest"' + ends_with), found.texts
        assert found.texts[0][2] == f"No idea.{ends[0]}"


@pytest.mark.parametrize(("text", "ends_with", "ends"), ENDS)
def test_generation_stops_at_each_end(text, ends_with, ends):
    tokenizer = make_tokenizer("chatml", text)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    encoder = ExampleEncoder(tokenizer, "default")
    assert list(encoder.end_tokens) == ends
    run = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o")
    exported = ExportedTemplate.of(tokenizer, run, ends[0], None)
    ids = tokenizer.convert_tokens_to_ids(ends)
    eos = tokenizer.eos_token_id
    assert encoder.stop_ids == list(dict.fromkeys([*ids, eos]))
    stops = exported.end_ids(tokenizer, eos)
    assert (stops if isinstance(stops, list) else [stops]) == list(dict.fromkeys([*ids, eos]))


def test_an_end_of_calls_inside_a_text_drops_the_record(tmp_path, model_of):
    says = {**RECORD, "chosen": [{**SAYS, "content": "Write <|call|> there."}]}
    found = read(tmp_path / "run", model_of(template("", "<|call|>"), tokens=TOKENS), [says, RECORD], max_refused=0.5)
    assert (found.exit_code, found.dropped) == (0, {"end_inside": 1}), found


@pytest.mark.parametrize("has_tools", [True, False])
def test_a_template_for_tools_has_ends_of_its_own(has_tools, tmp_path, model_of):
    several = {"default": template("", "<|call|>"), "tool_use": template("", "<|seen|>", end="<|im_over|>")}
    other = tmp_path / "other"
    other.mkdir()
    listed = [{"name": name, "template": text} for name, text in several.items()]
    (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert find_template(str(other)).text == several
    record = RECORD if has_tools else {key: value for key, value in RECORD.items() if key != "tools"}
    found = read(tmp_path / "run", model_of(None, tokens=TOKENS), [record], template=str(other))
    ends = ["<|seen|>", "<|im_over|>"] if has_tools else ["<|call|>", "<|im_end|>"]
    assert found.exit_code == 0, found
    assert [text.endswith(end) for text, end in zip(found.texts[0][1:], ends)] == [True, True], found.texts


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("gptoss", ["<|return|>", "<|call|>"]),
        ("glm4moe_training", ["<|user|>", "<|observation|>"]),
        ("gemma4", ["<turn|>", "<|tool_response>"]),
        ("gemma4_v2", ["<turn|>"]),
        ("qwen3", ["<|im_end|>"]),
        ("llama3_1", ["<|eot_id|>"]),
    ],
)
def test_families_end_calls_with_their_own_token(name, ends):
    tokenizer = tokenizer_for(TEMPLATES[name])
    encoder = ExampleEncoder(tokenizer, "default", date="2026-01-31")
    assert list(encoder.end_tokens) == ends
