"""What works around other packages."""

from __future__ import annotations

import inspect

import pytest
import torch

from dsdpo.compat import varlen_keywords
from dsdpo.trl_kernel import chunked_logps


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_kernel_alone_computes_what_trl_does(softcap: float | None, with_bias: bool) -> None:
    """To the bit, log-probs and gradients."""
    kernels = pytest.importorskip("trl.kernels")
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 8), (19, 8), *([(19,)] if with_bias else [])]
    targets = torch.randint(19, (6,), generator=generator)
    values = [torch.randn(shape, generator=generator) for shape in shapes]

    def results(of_trl: bool) -> list[torch.Tensor]:
        inputs = [value.clone().requires_grad_() for value in values]
        hidden, weight, bias = inputs if with_bias else (*inputs, None)
        if of_trl:
            logps, _, sum_sq, *_ = kernels.ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, 1.0, 7, softcap, 0.5, ("log_sum_sq_probs",)
            )
        else:
            logps, sum_sq = chunked_logps(hidden, weight, bias, targets, 7, softcap, 0.5, with_log_sum_sq=True)
        (logps * torch.arange(6)).sum().backward()
        return [logps, sum_sq, *(value.grad for value in inputs)]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(False), results(True)))


@pytest.mark.parametrize("grouped", [False, True])
def test_varlen_attn_takes_the_keywords_for_grouped_queries(grouped: bool) -> None:
    """Which torch 2.11 has not: any other keyword than those of the installed torch would stop a GPU's first step."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    keywords = varlen_keywords(grouped)
    inspect.signature(varlen.varlen_attn).bind(1, 2, 3, 4, 5, 6, 7, scale=1.0, window_size=(-1, 0), **keywords)
    assert keywords in ({}, {"enable_gqa": grouped})
