"""No rank ever holds a model in 16 bits that it quantizes: the peak of its memory while it loads, measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.dist.quantized import anonymous_bytes
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_tokenizer, tiny_llama_config

LAYERS = 11
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}


def save_wide_model(folder: Path, config: LlamaConfig) -> int:
    """Random weights in bf16, the same in every layer. Returns their bytes."""
    h, i = config.hidden_size, config.intermediate_size
    layer = {f"self_attn.{name}_proj": (h, h) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
    torch.manual_seed(0)
    drawn = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in layer.items()}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), torch.ones(h, dtype=torch.bfloat16))
    tensors = {
        f"model.layers.{number}.{name}.weight": value.clone()
        for number in range(config.num_hidden_layers)
        for name, value in (drawn | norms).items()
    }
    tensors["model.embed_tokens.weight"] = torch.zeros(config.vocab_size, h, dtype=torch.bfloat16).normal_()
    tensors["model.norm.weight"] = torch.ones(h, dtype=torch.bfloat16)
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
def test_the_peak_of_loading_is_far_below_16_bits(tmp_path: Path) -> None:
    """On 2 ranks, in anonymous memory beyond the imports: the 4-bit weights and a few tensors in fp32."""
    before = anonymous_bytes()
    whole = save_wide_model(tmp_path / "wide", tiny_llama_config(num_hidden_layers=LAYERS, **SIZES))
    assert whole > 2**30
    assert anonymous_bytes() - before < 0.5 * whole, "what this process has drawn is gone before the ranks start"
    save_tokenizer(tmp_path / "wide")
    cases = [{"model": str(tmp_path / "wide"), "quantization_bit": 4, "stage": stage} for stage in (2, 3)]
    for rank in run_ranks("tests.dist.quantized:load_and_watch", 2, str(tmp_path), cases, timeout=1800):
        for found, share in zip(rank, (1, 2)):
            growth = found["peak"] - found["before"]
            said = f"grew by {growth / whole:.2f} of the weights in 16 bits, from {found['before'] / 2**20:.0f} MiB"
            print(said)
            assert growth < 0.6 * whole, said
            assert found["packed"] == pytest.approx(whole / 4 / share, rel=0.02)
