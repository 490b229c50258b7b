"""Copies of rows and the sums of their gradients, beside plain index_select."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.data.packing import Segment
from dsdpo.model.attention.backends import varlen_attention
from dsdpo.model.attention.masks import PackedLayout
from dsdpo.model.gather import RowGather
from tests.helpers.varlen import varlen_in_plain_torch

CPU = torch.device("cpu")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@st.composite
def layouts(draw: st.DrawFn) -> list[Segment]:
    """Rows of examples: a prompt, or none, and up to five completions; with and without a shared prompt."""
    segments: list[Segment] = []
    end = 0
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.integers(0, 5))
        if prompt:
            segments.append(Segment(end, prompt))
        prefix = (end, prompt) if prompt else (0, 0)
        end += prompt
        for length in draw(st.lists(st.integers(1, 4), min_size=0 if prompt else 1, max_size=5)):
            segments.append(Segment(end, length, *prefix))
            end += length
    return segments


def both_ways(gather: RowGather, rows: int, dtype: torch.dtype, device: str = "cpu") -> list[list[torch.Tensor]]:
    """Output and gradient of index_select in fp64, of the gather, and of the gather once more."""
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, 6, generator=generator).to(device, dtype)
    weights = torch.randn(len(gather.index), 6, generator=generator).to(device, dtype)
    found = []
    for apply in (lambda x: x.index_select(0, gather.index), gather, gather):
        leaf = inputs.double() if apply is not gather else inputs.clone()
        output = apply(leaf.requires_grad_())
        found.append([output, torch.autograd.grad(output, leaf, weights.to(output.dtype))[0]])
    return found


def check(gather: RowGather, rows: int, dtype: torch.dtype, device: str = "cpu") -> None:
    exact, once, again = both_ways(gather, rows, dtype, device)
    for wanted, first, second in zip(exact, once, again):
        torch.testing.assert_close(first, wanted.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
        assert torch.equal(first, second), "the bits repeat"


@given(layouts())
@settings(max_examples=150)
def test_keys_of_any_layout(segments: list[Segment]) -> None:
    rows = sum(s.length for s in segments)
    gather = PackedLayout(segments, CPU).keys
    check(gather, rows, torch.float32)
    wanted = [
        i
        for s in segments
        for b, n in ((s.prefix_start, s.prefix_length), (s.start, s.length))
        for i in range(b, b + n)
    ]
    assert gather.index.tolist() == wanted


@given(
    st.integers(1, 20).flatmap(lambda rows: st.tuples(st.just(rows), st.lists(st.integers(0, rows - 1), max_size=40)))
)
@settings(max_examples=150)
def test_rows_that_repeat_or_are_missing(case: tuple[int, list[int]]) -> None:
    rows, index = case
    check(RowGather(np.array(index, dtype=np.int64), rows, CPU), rows, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_many_copies_is_rounded_once(device: str) -> None:
    """Sums of bf16 numbers are taken in fp32: 17 copies cost no more than one rounding."""
    index = np.concatenate([np.arange(50)] + [np.arange(10)] * 16)
    gather = RowGather(index, 50, torch.device(device))
    exact, once, _ = both_ways(gather, 50, torch.bfloat16, device)
    assert torch.equal(once[1], exact[1].float().bfloat16())
    check(gather, 50, torch.bfloat16, device)


def test_each_position_once_needs_no_order() -> None:
    assert RowGather(np.arange(7), 7, CPU).copies.order is None
    assert RowGather(np.arange(1, 7), 7, CPU).copies.order is not None
    assert RowGather(np.arange(6, -1, -1), 7, CPU).copies.order is None


@given(layouts(), st.sampled_from([(4, 2), (3, 3)]))
@settings(max_examples=30)
def test_attention_does_not_move_what_lies_in_rows(segments: list[Segment], heads: tuple[int, int]) -> None:
    """The kernel gets contiguous rows, and its output becomes [1, T, H, D] without a copy."""
    rows, given = sum(s.length for s in segments), []
    queries, *others = (torch.randn(1, rows, n, 8).transpose(1, 2) for n in (heads[0], heads[1], heads[1]))

    def kernel(q, k, v, *rest):  # type: ignore[no-untyped-def]
        assert q.data_ptr() == queries.data_ptr()
        assert all(x.is_contiguous() for x in (q, k, v))
        given.append(varlen_in_plain_torch(q, k, v, *rest).contiguous())
        return given[0]

    output = varlen_attention(queries, *others, PackedLayout(segments, CPU), 0.3, kernel=kernel)
    assert output.transpose(1, 2).contiguous().data_ptr() == given[0].data_ptr()
