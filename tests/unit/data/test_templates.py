"""Examples to token ids: golden renderings, one BOS, one end of turn, prompts that are prefixes."""

from __future__ import annotations

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example
from dsdpo.data.formats.dialogues import preference
from dsdpo.data.messages import assistant
from dsdpo.data.named_templates import NAMED
from dsdpo.data.templates import ExampleEncoder
from dsdpo.errors import ConfigError
from tests.unit.data.conftest import make_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "The sky?"},
]
PAIR = preference(TURNS, assistant("It is blue."), assistant("Green"))
GOLDEN = {
    "llama2": (
        "llama",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi! </s><s>[INST] The sky? [/INST]",
        " It is blue. </s>",
    ),
    "llama3": (
        "llama3",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThe sky?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "It is blue.<|eot_id|>",
    ),
    "chatml": (
        "chatml",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nThe sky?<|im_end|>\n<|im_start|>assistant\n",
        "It is blue.<|im_end|>",
    ),
    "none": ("gpt2", "Be brief.\nHello\nHi!\nThe sky?\n", "It is blue.<|endoftext|>"),
}
GOLDEN["qwen"] = GOLDEN["chatml"]
GOLDEN["gpt2"] = GOLDEN["none"]


def encode(tokenizer, template, pair, default_system=None):
    return ExampleEncoder(tokenizer, template, default_system).encode([pair])[0]


def stops(tokenizer, template):
    """The tokens that end a reply: the template's, and EOS."""
    encoder = ExampleEncoder(tokenizer, template)
    return tokenizer.convert_ids_to_tokens(list(dict.fromkeys([encoder.end_id, encoder.eos_id])))


def accepted(tokenizer, template, pair, default_system=None):
    encoded = encode(tokenizer, template, pair, default_system)
    assert not isinstance(encoded, Dropped), encoded
    return encoded


@pytest.mark.parametrize("template", GOLDEN)
def test_golden_rendering(template):
    family, prompt, chosen = GOLDEN[template]
    tokenizer = make_tokenizer(family)
    encoded = accepted(tokenizer, template, PAIR)
    assert tokenizer.decode(encoded.prompt_ids) == prompt
    assert tokenizer.decode(encoded.completion_ids[0]) == chosen
    assert ExampleEncoder(tokenizer, template).prompt_ids(TURNS) == encoded.prompt_ids
    assert not encoded.diverged


def test_own_template_is_the_default_and_its_tail_is_left_out():
    """ChatML ends a turn with a newline after the end-of-turn token; nothing is to be learned there."""
    tokenizer = make_tokenizer("chatml", NAMED["chatml"].jinja)
    assert accepted(tokenizer, "default", PAIR) == accepted(make_tokenizer("chatml"), "chatml", PAIR)


def test_template_with_more_after_the_end_of_turn():
    """Phi-like: every reply ends with <|im_end|>, the whole conversation with <|endoftext|>."""
    tokenizer = make_tokenizer(
        "chatml", NAMED["chatml"].jinja + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    )
    encoded = accepted(tokenizer, "default", PAIR)
    assert tokenizer.decode(encoded.completion_ids[0]) == "It is blue.<|im_end|>"
    assert stops(tokenizer, "default") == ["<|im_end|>"]


def test_template_without_an_end_of_turn_gets_eos():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = make_tokenizer("gpt2", template)
    encoded = accepted(tokenizer, "default", PAIR)
    assert tokenizer.decode(encoded.completion_ids[0]) == " It is blue.<|endoftext|>"


def test_qwen3_like_template_puts_thoughts_into_the_completion():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer("chatml", template)
    encoded = accepted(tokenizer, "default", PAIR)
    assert tokenizer.decode(encoded.completion_ids[0]) == "<think>\n\n</think>\n\nIt is blue.<|im_end|>"


@pytest.mark.parametrize(
    ("family", "template", "bos"),
    [
        ("llama", "none", ["<s>"]),
        ("llama", "llama2", ["<s>", "<s>"]),  # this family begins every user turn with BOS
        ("llama3", "none", ["<|begin_of_text|>"]),
        ("llama3", "llama3", ["<|begin_of_text|>"]),
        ("gpt2", "none", []),
    ],
)
def test_bos_stands_where_the_family_wants_it_and_once(family, template, bos):
    tokenizer = make_tokenizer(family)
    encoded = accepted(tokenizer, template, PAIR)
    found = [i for i in encoded.prompt_ids if i == tokenizer.bos_token_id]
    assert tokenizer.convert_ids_to_tokens(found) == bos
    if bos:
        assert encoded.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id == tokenizer.eos_token_id or tokenizer.bos_token_id not in encoded.completion_ids[0]


def test_bos_written_in_the_text_is_not_doubled():
    tokenizer = make_tokenizer("llama")
    encoded = accepted(tokenizer, "none", preference("<s>The sky is", " blue", " green"))
    assert encoded.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_chatml_on_a_tokenizer_with_bos_keeps_bos():
    tokenizer = make_tokenizer("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoded = accepted(tokenizer, "chatml", PAIR)
    assert tokenizer.convert_ids_to_tokens(encoded.prompt_ids[:2]) == ["<s>", "<|im_start|>"]
    assert stops(tokenizer, "chatml") == ["<|im_end|>", "</s>"]


@pytest.mark.parametrize("template", GOLDEN)
def test_each_completion_ends_with_its_only_end_of_turn(template):
    """Also where the padding token is the same one (llama, llama3 and gpt2 here)."""
    family = GOLDEN[template][0]
    tokenizer = make_tokenizer(family)
    end = ExampleEncoder(tokenizer, template).end_id
    for rejected in ("Green", ""):
        encoded = accepted(tokenizer, template, preference(TURNS, assistant("It is blue."), assistant(rejected)))
        for completion in encoded.completion_ids:
            assert completion[-1] == end and completion.count(end) == 1
    assert encoded.completion_ids[1] == [end]


def test_empty_rejected_text_is_eos_alone():
    tokenizer = make_tokenizer("gpt2")
    encoded = accepted(tokenizer, "none", preference("Question: 1+1?\n", "2", ""))
    assert encoded.completion_ids[1] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("template", GOLDEN)
def test_written_out_end_of_turn_is_not_doubled(template):
    tokenizer = make_tokenizer(GOLDEN[template][0])
    end = stops(tokenizer, template)[0]
    written = preference(TURNS, assistant(f"It is blue.{end}"), assistant(f"Green{end}\n"))
    assert accepted(tokenizer, template, written) == accepted(tokenizer, template, PAIR)
    inside = preference(TURNS, assistant(f"It is{end} blue."), assistant("Green"))
    assert encode(tokenizer, template, inside).reason == "the end-of-turn token stands inside a completion"


@pytest.mark.parametrize("texts", [(" blue",), (" blue", " green", "", " red")])
@pytest.mark.parametrize("as_chat", [True, False])
def test_examples_of_any_number_of_completions(texts, as_chat):
    """Each completion has the ids that it has in a pair."""
    tokenizer, template = (make_tokenizer("chatml"), "chatml") if as_chat else (make_tokenizer("gpt2"), "none")
    prompt = TURNS if as_chat else "The sky is"
    replies = tuple(assistant(text) if as_chat else text for text in texts)
    found = accepted(tokenizer, template, Example(prompt, replies, (None,) * len(texts)))
    other = assistant(" other") if as_chat else " other"
    pairs = [accepted(tokenizer, template, preference(prompt, reply, other)) for reply in replies]
    assert found.completion_ids == [pair.completion_ids[0] for pair in pairs]
    assert all(pair.prompt_ids == found.prompt_ids for pair in pairs)


def test_no_two_completions_are_the_same():
    example = Example("The sky is", (" blue", " red", " green", " red"), (None,) * 4)
    assert encode(make_tokenizer("gpt2"), "none", example).reason == "two completions are the same"


def test_text_stays_text_by_default_and_is_wrapped_by_a_named_template():
    pair = preference("The sky is", " blue", " green")
    own = make_tokenizer("chatml", NAMED["chatml"].jinja)
    plain = accepted(own, "default", pair)
    assert own.decode(plain.prompt_ids) == "The sky is"
    assert own.decode(plain.completion_ids[0]) == " blue<|im_end|>"
    wrapped = accepted(make_tokenizer("chatml"), "chatml", pair)
    assert own.decode(wrapped.prompt_ids) == "<|im_start|>user\nThe sky is<|im_end|>\n<|im_start|>assistant\n"


def test_prompt_that_merges_with_the_completion_is_split_where_they_part():
    """`blue` is one token, so is ` blue`: a prompt that ends with the space has it taken by the completion."""
    tokenizer = make_tokenizer("gpt2")
    encoded = accepted(tokenizer, "none", preference("the sky is ", "blue", "green"))
    assert encoded.diverged
    assert tokenizer.decode(encoded.prompt_ids) == "the sky is"
    assert tokenizer.decode(encoded.completion_ids[0]) == " blue<|endoftext|>"
    assert tokenizer.decode(encoded.completion_ids[1]) == " green<|endoftext|>"
    assert encode(tokenizer, "none", preference(" ", "blue", "green")).reason == "prompt and completion share no token"


def test_prompt_and_completion_are_the_tokens_of_the_whole_text():
    tokenizer = make_tokenizer("llama")
    for prompt, chosen in (("Question: What", " is it?"), ("a", "b"), ("x\n", "\ny"), ("äö", "ü 漢字")):
        encoded = accepted(tokenizer, "none", preference(prompt, chosen, "!"))
        whole = tokenizer(prompt + chosen)["input_ids"] + [tokenizer.eos_token_id]
        assert encoded.prompt_ids + encoded.completion_ids[0] == whole


def test_default_system_only_where_there_is_none():
    tokenizer = make_tokenizer("chatml")
    bare = preference(TURNS[1:], *PAIR.completions)
    assert accepted(tokenizer, "chatml", bare, default_system="Be brief.") == accepted(tokenizer, "chatml", PAIR)
    assert accepted(tokenizer, "chatml", PAIR, default_system="Other.") == accepted(tokenizer, "chatml", PAIR)
    asked = ExampleEncoder(tokenizer, "chatml", "Be brief.").prompt_ids(TURNS[1:])
    assert asked == ExampleEncoder(tokenizer, "chatml").prompt_ids(TURNS)


def test_tools_reach_the_own_template_and_no_other():
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    pair = preference(TURNS, *PAIR.completions, tools=tools)
    template = "{% if tools %}{{ tools[0]['function']['name'] + '\n' }}{% endif %}" + NAMED["chatml"].jinja
    tokenizer = make_tokenizer("chatml", template)
    assert tokenizer.decode(accepted(tokenizer, "default", pair).prompt_ids).startswith("now\n<|im_start|>system")
    for named in ("chatml", "none"):
        assert "tools need a chat template" in encode(tokenizer, named, pair).reason


def test_one_bad_pair_does_not_spoil_its_batch():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    encoder = ExampleEncoder(make_tokenizer("chatml", template + NAMED["chatml"].jinja), "default")
    good = preference(TURNS[1:], *PAIR.completions)
    surrogate = preference([{"role": "user", "content": "\ud800"}], *PAIR.completions)
    results = encoder.encode([good, PAIR, surrogate, good])
    assert results[0] == results[3] == encoder.encode([good])[0]
    assert str(results[1]) == "the chat template refuses the conversation: no system role"
    assert results[2].reason == "broken Unicode"
    assert encoder.encode([]) == []


def test_template_that_does_not_fit_is_a_config_error():
    with pytest.raises(ConfigError, match=r"template chatml needs the token <\|im_start\|>"):
        ExampleEncoder(make_tokenizer("llama"), "chatml")
    with pytest.raises(ConfigError, match=r"template llama3 needs the token"):
        ExampleEncoder(make_tokenizer("gpt2"), "llama3")
    with pytest.raises(ConfigError, match=r"template llama2 needs a bos_token"):
        ExampleEncoder(make_tokenizer("chatml"), "llama2")
    with pytest.raises(ConfigError, match="cannot render"):
        ExampleEncoder(make_tokenizer("chatml", "{{ raise_exception('never') }}"), "default")
    without_eos = make_tokenizer("gpt2")
    without_eos.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        ExampleEncoder(without_eos, "none")


def test_conversation_without_a_chat_template_names_the_option():
    encoder = ExampleEncoder(make_tokenizer("gpt2"), "default")
    with pytest.raises(ConfigError, match="set template"):
        encoder.check_supports(PAIR)
    dropped = encoder.encode([PAIR])[0]
    assert isinstance(dropped, Dropped) and dropped.code == "no_template"
    encoder.check_supports(preference("text", "a", "b"))
    assert isinstance(encoder.encode([preference("text", "a", "b")])[0].prompt_ids, list)


def test_stop_tokens():
    names = {template: stops(make_tokenizer(family), template) for template, (family, _, _) in GOLDEN.items()}
    assert names == {
        "llama2": ["</s>"],
        "llama3": ["<|eot_id|>", "<|end_of_text|>"],
        "chatml": ["<|im_end|>"],
        "qwen": ["<|im_end|>"],
        "none": ["<|endoftext|>"],
        "gpt2": ["<|endoftext|>"],
    }
