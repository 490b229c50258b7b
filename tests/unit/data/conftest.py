"""Byte-level BPE tokenizers in the manner of several model families, trained on a few lines."""

from __future__ import annotations

import functools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_LINES = [
    "Write one SQL query that answers the question. SELECT name FROM city WHERE country = 'Chad'",
    "The answer is blue, the sky is blue and the sea is green. Hello, how can I help you today?",
    "system user assistant\n\nHuman: Assistant: question: What is the capital of France? Paris.",
] * 4
_SPECIAL = {
    "llama": ["<unk>", "<s>", "</s>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt2": ["<|endoftext|>"],
}
_ROLES = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}


@functools.cache
def _backend(family: str) -> str:
    """The trained tokenizer as JSON; `llama` and `llama3` put BOS before every text, as theirs do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    if family.startswith("llama"):
        bos = _ROLES[family]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def make_tokenizer(family: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A new tokenizer of a family: llama, llama3, chatml or gpt2."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend(family)), **_ROLES[family])
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def model_folder(tmp_path):
    """A folder with a ChatML tokenizer that has a chat template."""
    from dsdpo.data.named_templates import NAMED

    folder = tmp_path / "model"
    make_tokenizer("chatml", NAMED["chatml"].jinja).save_pretrained(folder)
    return folder
