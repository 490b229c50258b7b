"""Examples of token ids: what is counted of them, and what stands for one in the reference store."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.data.example import MAX_COMPLETIONS, Lengths, TokenizedExample, example_digest
from tests.helpers.tiny import random_examples

IDS = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def contents(
    draw: st.DrawFn,
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[bool, ...], ...] | None]:
    """Prompt, completions and mask of a small example; ids are few, so that parts are often alike."""
    completions = draw(st.lists(IDS, min_size=1, max_size=MAX_COMPLETIONS))
    masks = [draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))) for ids in completions]
    mask = tuple(map(tuple, masks)) if draw(st.booleans()) else None
    return tuple(draw(IDS)), tuple(map(tuple, completions)), mask


def test_the_digest_is_the_one_that_stores_hold() -> None:
    """It must not change, or stored log-probs are lost."""
    prompt, chosen, rejected = parts = ([1, 2], [3], [49151, 4])
    assert example_digest(prompt, (chosen, rejected)).hex() == "c748b81cfdec68e0a20d0d58025dc3f5"
    for dtype in (np.int64, np.int32):
        first, *others = (np.array(part, dtype=dtype) for part in parts)
        assert example_digest(first, others) == example_digest(prompt, (chosen, rejected))


def test_digests_tell_where_the_parts_meet() -> None:
    pairs = (([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [4], [3]), ([1, 2], [3, 4], []))
    assert len({example_digest(prompt, rest) for prompt, *rest in pairs}) == len(pairs)


@given(st.lists(contents(), min_size=2, max_size=8))
@settings(max_examples=100)
def test_equal_digests_mean_equal_ids_completions_and_masks(examples: list) -> None:
    """Whatever K. An all-true mask is another example than none: what is stored covers the mask as it was given."""
    assert len({example_digest(*example) for example in examples}) == len(set(examples))


def test_digests_tell_k_and_masks_apart() -> None:
    """Contents that would be the same numbers if the parts were only put together."""
    examples = [
        ([1, 2], [[3], [4]], None),
        ([1, 2], [[3, 4]], None),
        ([1, 2], [[3], [4], []], None),
        ([1, 2], [[3], [4]], [[True], [True]]),
        ([1, 2], [[3], [4]], [[True], [False]]),
        ([1, 2], [[3], [4], [1, 1]], None),
        ([], [[1, 2, 3, 4]], None),
        ([], [[1, 2]], [[True, True]]),
        ([], [[1, 2], [1, 1]], None),
    ]
    assert len({example_digest(*example) for example in examples}) == len(examples)


@given(seed=st.integers(0, 1000), counts=st.lists(st.integers(1, MAX_COMPLETIONS), min_size=1, max_size=4))
@settings(max_examples=40)
def test_lengths_are_those_of_each_example(seed: int, counts: list[int]) -> None:
    examples = random_examples(9, tuple(counts), seed, masks=True, empty=True)
    lengths = Lengths.of(examples)
    assert len(lengths) == 9 and all(array.dtype == np.int64 for array in vars(lengths).values())
    assert lengths.counts.tolist() == [counts[i % len(counts)] for i in range(9)]
    owners = lengths.examples.tolist()
    for i, example in enumerate(examples):
        own = slice(lengths.starts[i], lengths.starts[i] + lengths.counts[i])
        tokens = [len(ids) for ids in example.completion_ids]
        assert lengths.completions[own].tolist() == tokens
        assert lengths.loss_tokens[own].tolist() == example.loss_tokens
        assert owners[own] == [i] * len(tokens)
        p = len(example.prompt_ids)
        assert lengths.prompt[i] == p
        assert lengths.packed(share_prefix=True)[i] == p + sum(tokens)
        assert lengths.packed(share_prefix=False)[i] == p * len(tokens) + sum(tokens)
    assert lengths.padded == lengths.packed(share_prefix=False).sum()


def test_lengths_of_pairs_and_of_nothing() -> None:
    examples = random_examples(3)
    expected = [[len(e.prompt_ids), *map(len, e.completion_ids)] for e in examples]
    assert Lengths.of(examples).per_pair.tolist() == expected
    assert len(Lengths.of([])) == 0 and Lengths.of([]).packed(share_prefix=True).shape == (0,)


def test_what_the_loss_sees() -> None:
    """What the mask says; and never the first token after an empty prompt, which nothing predicts."""
    ids = np.arange(3)
    mask = (np.array([True, False, True]), np.array([True]))
    completions = (ids, ids[:1])
    for prompt, masked, expected in (
        (ids, None, [[1, 1, 1], [1]]),
        (ids, mask, [[1, 0, 1], [1]]),
        (ids[:0], None, [[0, 1, 1], [0]]),
        (ids[:0], mask, [[0, 0, 1], [0]]),
    ):
        example = TokenizedExample(prompt, completions, masked)
        assert [example.is_scored(k).tolist() for k in range(2)] == expected
        assert example.loss_tokens == [sum(each) for each in expected]
    assert mask[0].tolist() == [True, False, True], "the mask itself stays"
