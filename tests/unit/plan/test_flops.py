"""Operations of a step: formulas against hand-made numbers, and against the attention of real layouts."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig

from dsdpo.data.example import Lengths
from dsdpo.data.packing import build_micro_batch
from dsdpo.plan.flops import mfu, step_flops, visible_pairs
from dsdpo.plan.shape import ModelShape
from tests.helpers.tiny import random_examples
from tests.unit.plan.shapes import LORA, SHAPE


def test_flops_of_llama_2_7b_are_what_its_size_says() -> None:
    """6 N T for long enough rows of a model of 6.6e9 weights in its layers and head."""
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    shape = ModelShape.from_config(llama)
    assert shape.linear == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    pair = Lengths.from_table(np.array([[0, 100, 100]]))
    attention = 12 * 32 * 4096 * 100**2
    head = 6 * 4096 * llama.vocab_size * 200
    assert step_flops(shape, pair, True, live=False) == 6 * shape.linear * 200 + attention + head
    prompted = Lengths.from_table(np.array([[300, 100, 100]]))
    shared, twice = (step_flops(shape, prompted, s, live=False) for s in (True, False))
    assert 0.6 < shared / twice < 0.65, "500 tokens in place of 800"


@pytest.mark.parametrize("share_prefix", [True, False])
def test_visible_pairs_are_those_of_the_segments(share_prefix: bool) -> None:
    """A segment of n tokens behind a prefix of p has n² / 2 + n p, for any number of completions."""
    examples = random_examples(12, counts=(1, 2, 4))
    segments = build_micro_batch(examples, range(12), share_prefix).segments
    expected = sum(s.length**2 / 2 + s.length * s.prefix_length for s in segments)
    assert visible_pairs(Lengths.of(examples), share_prefix) == expected


def test_the_head_computes_scored_tokens_only() -> None:
    """A frozen weight needs no gradient of its own: 4 in place of 6."""
    examples = random_examples(12, counts=(1, 3), masks=True)
    lengths = Lengths.of(examples)
    every = Lengths(lengths.prompt, lengths.counts, lengths.completions, lengths.completions)
    skipped = int(lengths.completions.sum() - lengths.loss_tokens.sum())
    assert skipped > 0
    for shape, factor in ((SHAPE, 6), (LORA, 4)):
        saved = step_flops(shape, every, True, live=False) - step_flops(shape, lengths, True, live=False)
        assert saved == factor * shape.hidden * shape.vocab * skipped


def test_mfu() -> None:
    assert mfu(8e12, seconds=2.0, gpus=4, peak=10.0) == pytest.approx(0.1)
