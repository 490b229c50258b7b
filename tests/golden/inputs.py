"""A tiny Llama, its tokenizer and pairs, written as plain files.

Nothing of dsdpo, torch or transformers is used, so that two commits, and two versions of a package, get the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

VOCAB = 96
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS = 32, 64, 2, 4, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HIDDEN // HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def save_model(folder: Path, seed: int = 0) -> None:
    """config.json and model.safetensors (75 KB): normal weights of standard deviation 0.2, norms of 1."""
    rng = np.random.default_rng(seed)
    heads = HIDDEN // HEADS * KEY_VALUE_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (heads, HIDDEN) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else 0.2 * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over `w3` … `w95` with <s>, </s> and <unk>, no chat template."""
    special = ["<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(3, VOCAB))])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": words[word], "content": word, **flags} for word in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_pairs(path: Path, n: int, seed: int = 0) -> None:
    """A JSONL file of pairs: prompts of 1 to 16 words, completions of 1 to 12."""
    rng = np.random.default_rng(seed)

    def words(longest: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, VOCAB, size=rng.integers(1, longest + 1)))

    records = [{"prompt": words(16), "chosen": f" {words(12)}", "rejected": f" {words(12)}"} for _ in range(n)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def zero_json(stage: int) -> str:
    """A DeepSpeed JSON of one ZeRO stage in which even tiny parameters are partitioned."""
    more = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return json.dumps({"zero_optimization": {"stage": stage, **more}}) + "\n"
