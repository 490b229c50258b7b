"""Tiny models and synthetic pairs, made on the spot."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from dsdpo.data.example import DIGEST, Lengths, TokenizedExample, example_digest
from dsdpo.model.support import COMPARED

VOCAB = 96
# The oldest transformers that is supported does not know all of COMPARED.
FAMILIES = sorted(kind for kind in COMPARED if kind in CONFIG_MAPPING)


def tiny_llama_config(tied: bool = True, **changes: object) -> LlamaConfig:
    """Two layers, grouped-query attention, a vocabulary of 96."""
    settings: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**settings, **changes})


def save_model(folder: Path, config: object, seed: int = 0) -> PreTrainedModel:
    """A randomly initialized model, saved to `folder` and returned in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    return model


def save_adapter(folder: Path, model: PreTrainedModel, base: Path, seed: int = 0) -> None:
    """A LoRA adapter of rank 4 with random matrices, so that it changes what the model computes. Changes `model`."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder)


def random_examples(
    n: int, counts: tuple[int, ...] = (2,), seed: int = 0, vocab: int = VOCAB, masks: bool = False, empty: bool = False
) -> list[TokenizedExample]:
    """Examples of random ids: prompts of 1 to 30 tokens, completions of 1 to 20.

    Args:
        counts: numbers of completions, in turn.
        masks: whether every second example has a random loss mask.
        empty: whether every third example has an empty prompt.
    """
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(3, vocab, size=rng.integers(1, longest + 1))

    found = []
    for i in range(n):
        prompt = ids(30)
        completions = tuple(ids(20) for _ in range(counts[i % len(counts)]))
        mask = tuple(rng.random(len(x)) < 0.6 for x in completions) if masks and i % 2 else None
        found.append(TokenizedExample(prompt[:0] if empty and i % 3 == 2 else prompt, completions, mask))
    return found


def random_pairs(n: int, seed: int = 0, vocab: int = VOCAB) -> list[TokenizedExample]:
    """Examples of two completions."""
    return random_examples(n, seed=seed, vocab=vocab)


def save_pairs(path: Path, n: int, seed: int = 0, stage: str = "dpo") -> None:
    """A JSONL file of pairs in the words of `save_tokenizer`: prompts of 3 to 12 words, completions of 3 to 8.

    For stage `sft`, `kto` or `pt`, their better answers, labelled answers, or both answers as a text.
    """
    rng = np.random.default_rng(seed)

    def words(longest: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, VOCAB, size=rng.integers(3, longest + 1)))

    pairs = [(words(12), words(8), words(8)) for _ in range(n)]
    rows: list[dict[str, object]] = [{"prompt": p, "chosen": w, "rejected": other} for p, w, other in pairs]
    if stage == "sft":
        rows = [{"prompt": p, "completion": w} for p, w, _ in pairs]
    elif stage == "kto":
        rows = [{"prompt": p, "completion": w, "label": i % 2 == 0} for i, (p, w, _) in enumerate(pairs)]
    elif stage == "pt":
        rows = [{"text": " ".join(pair)} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class ListOfExamples:
    """Examples in memory with the methods of a prepared set.

    Args:
        scores: float64 [N] of all completions; none by default.
        weights: float64 [examples]; 1 by default.
    """

    def __init__(
        self, examples: list[TokenizedExample], scores: np.ndarray | None = None, weights: np.ndarray | None = None
    ) -> None:
        self._examples = examples
        self._lengths = Lengths.of(examples)
        self._scores = np.full(len(self._lengths.completions), np.nan) if scores is None else scores
        self._weights = np.ones(len(examples)) if weights is None else weights

    @property
    def fingerprint(self) -> str:
        return sha256(self.digests(np.arange(len(self))).tobytes()).hexdigest()

    earlier_fingerprints: ClassVar[dict[int, str]] = {}
    template_date = None
    end_token = None

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def sizes(self) -> list[int]:
        return [len(self)]

    def lengths(self, ids: np.ndarray) -> Lengths:
        return Lengths.of([self._examples[i] for i in ids])

    def digests(self, ids: np.ndarray) -> np.ndarray:
        chosen = (self._examples[i] for i in ids)
        found = b"".join(example_digest(e.prompt_ids, e.completion_ids, e.loss_mask) for e in chosen)
        return np.frombuffer(found, dtype=DIGEST)

    def scores(self, ids: np.ndarray) -> np.ndarray:
        starts, counts = self._lengths.starts, self._lengths.counts
        return np.concatenate([self._scores[starts[i] : starts[i] + counts[i]] for i in ids])

    def weights(self, ids: np.ndarray) -> np.ndarray:
        return self._weights[ids]

    def example(self, index: int) -> TokenizedExample:
        return self._examples[index]

    def where(self, index: int) -> str:
        return f"memory:{index + 1}"


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over `w3` … `w95` with <s>, </s> and <unk>, no chat template."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
