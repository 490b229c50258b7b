from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from dsdpo.data.packing import build_row
from dsdpo.errors import ConfigError
from dsdpo.model.attention import BACKENDS, RowLayout, check_supported, choose, varlen_attention
from tests.helpers.tiny import random_pairs

CPU = torch.device("cpu")


def varlen_in_plain_torch(q, k, v, cu_q, cu_k, max_q, max_k, scale):  # type: ignore[no-untyped-def]
    """What a variable-length kernel computes, a segment at a time: causal, aligned bottom right."""
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        query, key, value = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        assert query.shape[1] <= max_q and key.shape[1] <= max_k
        mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def tensors(tokens: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, tokens, 16), (1, 2, tokens, 16), (1, 2, tokens, 16)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def output_and_gradients(
    attend: Callable[..., torch.Tensor], qkv: list[torch.Tensor], layout: RowLayout
) -> list[torch.Tensor]:
    output = attend(*qkv, layout, 0.25)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [output, *torch.autograd.grad((output.float() * weights).sum(), qkv)]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_varlen_call_computes_what_sdpa_per_segment_does(share_prefix: bool) -> None:
    row = build_row(random_pairs(4, seed=7), range(4), share_prefix)
    qkv = tensors(len(row.input_ids))
    layout = RowLayout(row.segments, CPU)
    expected = output_and_gradients(BACKENDS["sdpa"], qkv, layout)
    found = output_and_gradients(lambda *args: varlen_attention(*args, kernel=varlen_in_plain_torch), qkv, layout)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_cuda_backends_match_fp32_sdpa(backend: str, share_prefix: bool) -> None:
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn")
    cuda = torch.device("cuda")
    row = build_row(random_pairs(4, seed=7), range(4), share_prefix)
    layout = RowLayout(row.segments, cuda)
    expected = output_and_gradients(BACKENDS["sdpa"], tensors(len(row.input_ids), cuda), layout)
    found = output_and_gradients(BACKENDS[backend], tensors(len(row.input_ids), cuda, torch.bfloat16), layout)
    for a, b in zip(found, expected):
        assert (a.float() - b).norm() / b.norm() < 1e-2


def test_choice_of_backend() -> None:
    cuda = torch.device("cuda")
    assert choose("auto", CPU, bf16=False) == choose("auto", cuda, bf16=False) == "dsdpo_sdpa"
    assert choose("auto", cuda, bf16=True) == "dsdpo_varlen"
    with pytest.raises(ConfigError, match="needs CUDA and bf16"):
        choose("varlen", CPU, bf16=False)


def test_models_beyond_causal_softmax_attention_are_refused() -> None:
    check_supported(LlamaConfig(), 4096, disable_dropout=True)
    check_supported(MistralConfig(sliding_window=4096), 4096, disable_dropout=True)
    check_supported(Qwen2Config(use_sliding_window=False, sliding_window=64), 4096, disable_dropout=True)
    with pytest.raises(ConfigError, match="windows of 512 tokens"):
        check_supported(MistralConfig(sliding_window=512), 1024, disable_dropout=True)
    with pytest.raises(ConfigError, match="attn_logit_softcapping"):
        check_supported(Gemma2Config(sliding_window=8192), 1024, disable_dropout=True)
    with pytest.raises(ConfigError, match="disable_dropout"):
        check_supported(LlamaConfig(attention_dropout=0.1), 1024, disable_dropout=False)
