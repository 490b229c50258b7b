"""The prompt is tokenized once: the ids must be those of the whole texts, on real data too."""

from __future__ import annotations

import functools
import gzip
import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example
from dsdpo.data.formats.dialogues import preference
from dsdpo.data.formats.record import to_example
from dsdpo.data.named_templates import NAMED
from dsdpo.data.readers import iter_rows
from dsdpo.data.registry import resolve
from dsdpo.data.templates import ExampleEncoder, load_tokenizer
from dsdpo.data.tokens import Tokens
from tests.helpers.real import shared_file, smollm2
from tests.unit.data.conftest import make_tokenizer

ROOT = Path(__file__).parents[3]


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- borders ---

PIECES = [
    "<|endoftext|>",
    "<s>",
    "<s",
    "s>",
    ">",
    "<",
    "<pad>",
    "<s><pad>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "a",
    "b c",
    "ab",
    "é",
    "▁",
    "漢",
]


@functools.cache
def tokenizer_like(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers whose first piece differs from the others, or whose special tokens look at what stands beside them."""
    tokenizer = Tokenizer.from_str(make_tokenizer("gpt2").backend_tokenizer.to_str())
    if kind in ("metaspace", "prepend", "normalized"):
        letters = {letter: number for number, letter in enumerate("▁<>spadbc\né漢")}
        merges = [("▁", "a"), ("a", "b")]
        tokenizer = Tokenizer(models.BPE({**letters, "▁a": 20, "ab": 21, "<unk>": 22}, merges, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind == "metaspace":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    odd = {
        "lstrip": [AddedToken("<pad>", normalized=False, lstrip=True)],
        "rstrip": [AddedToken("<pad>", normalized=False, rstrip=True)],
        "single_word": [AddedToken("<pad>", normalized=False, single_word=True)],
        "normalized": [AddedToken("<pad>", normalized=True)],
        "overlapping": [AddedToken("a<s", normalized=False, lstrip=True)],
        "containing": [AddedToken("b<s>a", normalized=False)],
        "longer": [AddedToken("<s>a", normalized=False)],
    }
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False), *odd.get(kind, [])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


KINDS = ["plain", "metaspace", "prepend", "lstrip", "rstrip", "single_word", "normalized", "overlapping", "containing"]


@pytest.mark.parametrize("kind", [*KINDS, "longer"])
def test_ids_part_at_the_border_however_the_text_goes_on(kind):
    tokenizer, choose = tokenizer_like(kind), random.Random(0).choices
    n_borders = 0
    samples = [("".join(choose(PIECES, k=k % 6)), "".join(choose(PIECES, k=k % 4))) for k in range(2000)]
    for text, more in [*samples, ("ab<s>", "a"), ("<s>", "ab")]:
        border = Tokens(tokenizer).last_border(text)
        n_borders += border > 0
        parts = (text[:border], text[border:] + more)
        assert whole(tokenizer, text + more) == whole(tokenizer, parts[0]) + whole(tokenizer, parts[1]), (text, more)
    assert n_borders > 100


def test_the_border_is_the_last_special_token_that_stands_alone():
    assert Tokens(tokenizer_like("plain")).last_border("a<s>b <s> c") == 6
    assert Tokens(tokenizer_like("lstrip")).last_border("a<s>b <pad> c") == 1
    for kind in ("overlapping", "containing"):
        assert Tokens(tokenizer_like(kind)).last_border("a<s>b") == 0
    assert Tokens(tokenizer_like("plain")).last_border("no token") == 0


def test_padding_and_truncation_that_a_tokenizer_was_saved_with_are_not_used():
    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(2)
    texts = ["the answer is blue", "", "the answer is blue", "green<|im_end|>"]
    ids = Tokens(tokenizer).encode(texts)
    assert ids == {text: whole(make_tokenizer("chatml"), text) for text in texts}


def test_a_tokenizer_written_in_python_is_asked_for_whole_texts():
    tokenizer = ByT5Tokenizer()
    tokens = Tokens(tokenizer)
    assert tokens.last_border("ab</s>c") == 0 and tokens.encode([]) == {}
    assert tokens.encode(["ab</s>c", "é"]) == {"ab</s>c": whole(tokenizer, "ab</s>c"), "é": whole(tokenizer, "é")}


# --- whole pairs ---


def repository_pairs(limit: int = 60) -> list[Example]:
    """Pairs of every sample in data/."""
    info = json.loads((ROOT / "data/dataset_info.json").read_bytes())
    names = [name for name, entry in info.items() if entry.get("ranking") and name != "text_to_sql"]
    entries, problems = resolve(names, ROOT / "data")
    assert not problems
    pairs = []
    for entry in entries:
        for _, row in iter_rows(entry, limit):
            row = json.loads(row) if isinstance(row, bytes) else row
            pairs.append(to_example(row, entry.formatting, entry.columns, entry.tags, entry.allow_empty_rejected))
    return pairs


def real_pairs() -> list[Example]:
    """hh-rlhf with its long dialogues, and dpo_en_demo."""
    pairs: list[Example] = []
    with gzip.open(shared_file("hh_harmless_base_test.jsonl.gz"), "rt") as lines:
        rows = [("hh_rlhf", json.loads(line)) for line, _ in zip(lines, range(400))]
    rows += [("sharegpt", row) for row in json.loads(shared_file("dpo_en_demo.json").read_bytes())[:60]]
    for formatting, row in rows:
        try:
            pairs.append(to_example(row, formatting, {}, {}, False))
        except Dropped:
            continue
    return pairs


class TextByText(ExampleEncoder):
    """The same without short cuts: transformers' own calls, every text whole."""

    def __init__(self, tokenizer, template):
        super().__init__(tokenizer, template)
        if self._texts.chat is not None:
            self._texts.chat._renderer = lambda messages, tools, for_reply: tokenizer.apply_chat_template(
                messages,
                tools,
                chat_template=NAMED[template].jinja if template in NAMED else None,
                add_generation_prompt=for_reply,
                tokenize=False,
            )

    def encode(self, pairs):
        self.tokens.last_border = lambda text: 0
        self.tokens.encode = lambda texts: {text: whole(self.tokenizer, text) for text in texts}
        return super().encode(pairs)


def same(tokenizer, template, pairs):
    found, expected = (kind(tokenizer, template).encode(pairs) for kind in (ExampleEncoder, TextByText))
    assert [str(one) for one in found] == [str(one) for one in expected]
    assert sum(isinstance(one, Dropped) for one in found) <= 0.02 * len(pairs)


@pytest.mark.parametrize(
    ("family", "template"),
    [("chatml", "default"), ("chatml", "chatml"), ("llama", "llama2"), ("llama3", "llama3"), ("gpt2", "none")],
)
def test_ids_are_those_of_the_whole_texts(family, template):
    tokenizer = make_tokenizer(family, NAMED["chatml"].jinja if template == "default" else None)
    same(tokenizer, template, repository_pairs())


@pytest.mark.start
@pytest.mark.parametrize("template", ["default", "chatml", "llama2", "llama3", "none"])
def test_ids_are_those_of_the_whole_texts_on_real_data(template):
    tokenizer = load_tokenizer(str(smollm2()))
    if template == "llama3":
        tokenizer.add_special_tokens({"additional_special_tokens": list(NAMED["llama3"].tokens)})
    same(tokenizer, template, real_pairs())


def test_a_template_that_writes_the_prompt_anew_once_it_is_answered_is_refused():
    """What the texts share would end before the reply begins."""
    template = "{{ 'asked: ' if add_generation_prompt else 'answered: ' }}" + NAMED["chatml"].jinja
    pair = preference(
        [{"role": "user", "content": "Hi"}], *([{"role": "assistant", "content": x}] for x in ("yes", "no"))
    )
    tokenizer = make_tokenizer("chatml", template)
    assert ExampleEncoder(tokenizer, "default").encode([pair])[0].code == "prompt_differs"


def test_conversations_are_rendered_as_transformers_does():
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    template += "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>' }}"
    template += "{% endfor %}{% if add_generation_prompt %}{{ eos_token + '<|im_start|>assistant' }}{% endif %}"
    tokenizer = make_tokenizer("chatml", template)
    calls = [{"type": "function", "function": {"name": "now", "arguments": {"zone": None, "n": 1.5}}}]
    messages = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    for tools in (None, [{"type": "function", "function": {"name": "now"}}]):
        for for_reply in (True, False):
            rendered = [
                kind(tokenizer, "default")._texts.chat.render(messages, tools, for_reply)
                for kind in (ExampleEncoder, TextByText)
            ]
            assert rendered[0] == rendered[1]
