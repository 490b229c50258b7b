"""`max_tokens_per_row: auto`: the estimate's parts. That it fits a real GPU is for the GPU tests."""

import pytest
from transformers import AutoConfig, LlamaConfig

from dsdpo.plan.memory import activation_bytes_per_token, longest_row, optimizer_bytes

LLAMA_7B = LlamaConfig()  # transformers' defaults are Llama-2-7B's sizes


def test_activations_of_a_7b_model() -> None:
    """32 layers of h = g = 4096, i = 11008 in bf16: 32 (2 (14 h + 4 i) + 8 h) bytes."""
    assert activation_bytes_per_token(LLAMA_7B, 2, False) == 32 * (2 * (14 * 4096 + 4 * 11008) + 8 * 4096)
    recomputed = activation_bytes_per_token(LLAMA_7B, 2, True)
    assert recomputed < activation_bytes_per_token(LLAMA_7B, 2, False) / 15


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi3", "gemma3_text", "mistral"])
def test_every_family_has_the_sizes(kind: str) -> None:
    assert activation_bytes_per_token(AutoConfig.for_model(kind), 4, False) > 0


def test_zero_shards_what_it_shards() -> None:
    assert [optimizer_bytes(100, stage, 4) for stage in (0, 1, 2, 3)] == [1200, 600, 300, 300]


def test_a_row_holds_at_least_one_pair() -> None:
    assert longest_row(10**9, 10**5, 512) == 9984
    assert longest_row(0, 10**5, 512) == 1024
