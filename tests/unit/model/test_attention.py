from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config

from dsdpo.config.precision import Precision
from dsdpo.config.rules import missing_flash_package
from dsdpo.data.packing import Segment, build_micro_batch
from dsdpo.errors import ConfigError
from dsdpo.model.attention.backends import BACKENDS, flex, sdpa, varlen_attention
from dsdpo.model.attention.masks import PackedLayout
from dsdpo.model.attention.register import NAMES, choose
from tests.helpers.tiny import random_pairs, tiny_llama_config
from tests.helpers.varlen import varlen_in_plain_torch

CPU = torch.device("cpu")
VOLTA, TURING, AMPERE, HOPPER = (7, 0), (7, 5), (8, 0), (9, 0)  # compute capabilities


def tensors(tokens: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, tokens, 16), (1, 2, tokens, 16), (1, 2, tokens, 16)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def output_and_gradients(
    attend: Callable[..., torch.Tensor], qkv: list[torch.Tensor], layout: PackedLayout
) -> list[torch.Tensor]:
    output = attend(*qkv, layout, 0.25)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [output, *torch.autograd.grad((output.float() * weights).sum(), qkv)]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_varlen_call_computes_what_sdpa_per_segment_does(share_prefix: bool) -> None:
    micro_batch = build_micro_batch(random_pairs(4, seed=7), range(4), share_prefix)
    qkv = tensors(len(micro_batch.input_ids))
    layout = PackedLayout(micro_batch.segments, CPU)
    expected = output_and_gradients(BACKENDS["sdpa"], qkv, layout)
    found = output_and_gradients(lambda *args: varlen_attention(*args, kernel=varlen_in_plain_torch), qkv, layout)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_cuda_backends_match_fp32_sdpa(backend: str, share_prefix: bool) -> None:
    if missing := missing_flash_package(backend):
        pytest.skip(missing)
    cuda = torch.device("cuda")
    micro_batch = build_micro_batch(random_pairs(4, seed=7), range(4), share_prefix)
    layout = PackedLayout(micro_batch.segments, cuda)
    expected = output_and_gradients(BACKENDS["sdpa"], tensors(len(micro_batch.input_ids), cuda), layout)
    found = output_and_gradients(BACKENDS[backend], tensors(len(micro_batch.input_ids), cuda, torch.bfloat16), layout)
    for a, b in zip(found, expected):
        assert (a.float() - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_block_mask_allows_what_sdpa_computes(share_prefix: bool) -> None:
    micro_batch = build_micro_batch(random_pairs(9, seed=3), range(9), share_prefix)
    assert len(micro_batch.input_ids) > 256, "several blocks of 128"
    layout = PackedLayout(micro_batch.segments, CPU)
    qkv = [x.detach() for x in tensors(len(micro_batch.input_ids))]
    torch.testing.assert_close(flex(*qkv, layout, 0.25), sdpa(*qkv, layout, 0.25), rtol=1e-5, atol=1e-5)


def test_choice_of_backend() -> None:
    for capability in (None, VOLTA, TURING, AMPERE, HOPPER):
        for precision in get_args(Precision):
            assert choose("sdpa", precision, capability) == "dsdpo_sdpa"
            runs_varlen = capability in (AMPERE, HOPPER) and precision != "fp32"
            assert choose("auto", precision, capability) == ("dsdpo_varlen" if runs_varlen else "dsdpo_sdpa")
            if capability is not None:
                assert choose("flex_attention", precision, capability) == "dsdpo_flex"


@pytest.mark.parametrize("backend", [name for name in NAMES if name != "sdpa"])
def test_an_unusable_choice_is_an_error(backend: str) -> None:
    assert refused(backend, "bf16", None) == ["no-cuda"]
    if backend != "flex_attention":
        assert refused(backend, "fp32", AMPERE) == ["attention-gpu"]
        for precision in ("bf16", "fp16"):
            assert refused(backend, precision, TURING) == refused(backend, precision, VOLTA) == ["attention-gpu"]
    if missing := missing_flash_package(backend):
        for precision in ("bf16", "fp16"):
            assert refused(backend, precision, HOPPER) == ["attention"]
        assert backend in missing


def refused(backend: str, precision: Any, capability: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        choose(backend, precision, capability)
    return [problem.code for problem in caught.value.problems]


@pytest.mark.parametrize("name", NAMES.values())
def test_transformers_takes_our_names_for_ours(name: str) -> None:
    """GPT-2 has no support for FlexAttention, and a name with `flash` in it makes transformers fetch a kernel."""
    for config in (tiny_llama_config(), GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
        assert model.config._attn_implementation == name


class Layer(torch.nn.Module):
    """What an attention layer tells of itself."""

    is_causal = True


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"softcap": 50.0}, "softcap"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal=False"),
        ({"sliding_window": 49}, "sliding_window"),
    ],
)
def test_a_keyword_that_changes_the_result_is_refused(keywords: dict[str, object], said: str) -> None:
    layout = PackedLayout([Segment(0, 30), Segment(30, 20, 0, 30)], CPU)
    attend = AttentionInterface()["dsdpo_sdpa"]
    qkv = tensors(50)
    attend(Layer(), *qkv, None, packed_layout=layout, sliding_window=50, softcap=None, is_causal=True, use_cache=False)
    with pytest.raises(ConfigError, match=said):
        attend(Layer(), *qkv, None, packed_layout=layout, **keywords)


def test_a_layer_that_looks_ahead_is_refused() -> None:
    layer = Layer()
    layer.is_causal = False
    with pytest.raises(ConfigError, match="is_causal=False"):
        AttentionInterface()["dsdpo_sdpa"](layer, *tensors(5), None, packed_layout=PackedLayout([Segment(0, 5)], CPU))
