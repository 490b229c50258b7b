import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.data.example import MAX_COMPLETIONS, Lengths, TokenizedExample
from dsdpo.data.packing import build_micro_batch, empty_micro_batch, idle_share, only_completion, plan_step
from dsdpo.errors import DataError
from tests.helpers.tiny import random_examples

PLANS = {"tokens": st.lists(st.integers(3, 200), min_size=1, max_size=60), "world": st.integers(1, 9)}


@given(**PLANS)
@settings(max_examples=100)
def test_each_example_once_nothing_too_long_every_rank_the_same_steps(tokens: list[int], world: int) -> None:
    plan = plan_step(np.array(tokens), world, 256)
    assert all(len(micro_step) == world for micro_step in plan)
    rows = [row for micro_step in plan for row in micro_step]
    assert sorted(i for row in rows for i in row) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in row) <= 256 for row in rows)


@given(**PLANS)
@settings(max_examples=50)
def test_no_micro_step_is_wasted(tokens: list[int], world: int) -> None:
    """At least one row of every micro-step has a pair: nobody computes dummies only."""
    assert all(any(micro_step) for micro_step in plan_step(np.array(tokens), world, 256))


def test_ranks_are_balanced() -> None:
    tokens = np.random.default_rng(0).integers(50, 400, size=256)
    plan = plan_step(tokens, 8, 4096)
    assert idle_share(plan, tokens) < 0.02


def test_idle_share() -> None:
    tokens = np.array([10, 4, 6, 5])
    assert idle_share([[[0], [1, 2]], [[3], []]], tokens) == pytest.approx(1 - 25 / 30)
    assert idle_share([[[0, 1, 2, 3]]], tokens) == 0


def test_an_example_longer_than_a_micro_batch_is_an_error() -> None:
    with pytest.raises(DataError, match=r"300 tokens, max_tokens_per_row is 256"):
        plan_step(np.array([10, 300]), 2, 256)


@st.composite
def micro_batches(draw: st.DrawFn) -> list[TokenizedExample]:
    """One to five examples of 1 to 16 completions, some masked, some with an empty prompt."""
    counts = draw(st.lists(st.integers(1, MAX_COMPLETIONS), min_size=1, max_size=5))
    masks, empty = draw(st.booleans()), draw(st.booleans())
    return random_examples(len(counts), tuple(counts), draw(st.integers(0, 10**6)), masks=masks, empty=empty)


@given(examples=micro_batches(), share_prefix=st.booleans())
@settings(max_examples=80)
def test_a_micro_batch_scores_exactly_what_the_masks_say(examples: list[TokenizedExample], share_prefix: bool) -> None:
    micro_batch = build_micro_batch(examples, range(len(examples)), share_prefix)
    ids, positions = micro_batch.input_ids, micro_batch.position_ids
    assert len(ids) == len(positions) == sum(s.length for s in micro_batch.segments)
    assert len(ids) == Lengths.of(examples).packed(share_prefix).sum()
    assert micro_batch.examples.tolist() == list(range(len(examples)))
    assert micro_batch.completions[:, 2].sum() == len(micro_batch.loss_positions) == len(micro_batch.target_ids)
    places = [(i, k) for i, example in enumerate(examples) for k in range(len(example.completion_ids))]
    assert [tuple(place) for place in micro_batch.completions[:, :2].tolist()] == places
    end = np.cumsum(micro_batch.completions[:, 2])
    for (i, k), start, stop, last in zip(places, [0, *end], end, micro_batch.last_positions, strict=False):
        example = examples[i]
        answer, first = example.completion_ids[k], len(example.prompt_ids)
        scored = np.flatnonzero(example.is_scored(k))
        assert micro_batch.target_ids[start:stop].tolist() == answer[scored].tolist()
        # the source of the i-th completion token sits at position p - 1 + i of its own sequence
        assert positions[micro_batch.loss_positions[start:stop]].tolist() == (first - 1 + scored).tolist()
        assert ids[last] == answer[-1] and positions[last] == first + len(answer) - 1


@given(examples=micro_batches())
@settings(max_examples=60)
def test_what_predicts_a_token_sees_its_own_example_alone(examples: list[TokenizedExample]) -> None:
    """Shared prompt or not: what a scored token follows, in its segment and that one's prefix, is its sequence."""
    for share_prefix in (True, False):
        micro_batch = build_micro_batch(examples, range(len(examples)), share_prefix)
        starts = np.array([s.start for s in micro_batch.segments])
        owners = np.repeat(np.arange(len(micro_batch.completions)), micro_batch.completions[:, 2])
        inside = np.concatenate(
            [np.flatnonzero(e.is_scored(k)) for e in examples for k in range(len(e.completion_ids))]
        )
        for at, owner, number in zip(micro_batch.loss_positions, owners, inside, strict=True):
            i, k, _ = micro_batch.completions[owner]
            segment = micro_batch.segments[int(np.searchsorted(starts, at, side="right")) - 1]
            prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix_length)
            seen = np.concatenate([micro_batch.input_ids[prefix], micro_batch.input_ids[segment.start : at + 1]])
            whole = np.concatenate([examples[i].prompt_ids, examples[i].completion_ids[k]])
            assert seen.tolist() == whole[: len(examples[i].prompt_ids) + number].tolist()


@given(examples=micro_batches())
@settings(max_examples=40)
def test_sharing_the_prompt_changes_no_target_or_position(examples: list[TokenizedExample]) -> None:
    shared, plain = (build_micro_batch(examples, range(len(examples)), share) for share in (True, False))
    assert np.array_equal(shared.target_ids, plain.target_ids)
    assert np.array_equal(shared.completions, plain.completions)
    for name in ("loss_positions", "last_positions"):
        positions = (batch.position_ids[getattr(batch, name)] for batch in (shared, plain))
        assert np.array_equal(*positions)


def test_indices_are_those_of_the_batch() -> None:
    micro_batch = build_micro_batch(random_examples(3, (1, 3, 2)), [7, 2, 5], share_prefix=True)
    assert micro_batch.completions[:, :2].tolist() == [[7, 0], [2, 0], [2, 1], [2, 2], [5, 0], [5, 1]]
    assert micro_batch.examples.tolist() == [7, 2, 5]


@given(examples=micro_batches(), share_prefix=st.booleans())
@settings(max_examples=40)
def test_segments_follow_one_another_and_point_to_their_prompts(
    examples: list[TokenizedExample], share_prefix: bool
) -> None:
    micro_batch = build_micro_batch(examples, range(len(examples)), share_prefix)
    segments = iter(micro_batch.segments)
    starts = [s.start for s in micro_batch.segments]
    assert starts == np.cumsum([0] + [s.length for s in micro_batch.segments[:-1]]).tolist()
    for example in examples:
        p, prompt = len(example.prompt_ids), None
        if share_prefix and p:
            prompt = next(segments)
            assert (prompt.length, prompt.prefix_length) == (p, 0)
        for ids in example.completion_ids:
            segment = next(segments)
            assert segment.length == len(ids) + (0 if share_prefix else p)
            expected = (prompt.start, prompt.length) if prompt else (0, 0)
            assert (segment.prefix_start, segment.prefix_length) == expected
    assert next(segments, None) is None


def test_an_empty_micro_batch_has_no_examples() -> None:
    micro_batch = empty_micro_batch()
    assert len(micro_batch.examples) == len(micro_batch.completions) == len(micro_batch.last_positions) == 0
    assert len(micro_batch.input_ids) == sum(s.length for s in micro_batch.segments) == 2
    assert len(micro_batch.loss_positions) == len(micro_batch.target_ids) == 1, "the head has something to compute"


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_one_completion_of_each_example(share_prefix: bool, number: int) -> None:
    """The same as if the others had never been there."""
    for seed in range(20):
        examples = random_examples(5, (2, 3), seed, masks=True, empty=True)
        indices = [4, 0, 7, 2, 9]
        found = only_completion(build_micro_batch(examples, indices, share_prefix), number)
        masks = [None if e.loss_mask is None else (e.loss_mask[number],) for e in examples]
        alone = [TokenizedExample(e.prompt_ids, (e.completion_ids[number],), mask) for e, mask in zip(examples, masks)]
        wanted = build_micro_batch(alone, indices, share_prefix)
        assert found.segments == wanted.segments
        for name in ("input_ids", "position_ids", "loss_positions", "target_ids", "completions", "last_positions"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
    empty = empty_micro_batch()
    assert only_completion(empty, number) is empty
