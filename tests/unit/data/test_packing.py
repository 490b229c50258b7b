import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.data.packing import build_row, dummy_row, idle_share, plan_step, row_lengths
from dsdpo.errors import DataError
from tests.helpers.tiny import random_pairs

PLANS = {"tokens": st.lists(st.integers(3, 200), min_size=1, max_size=60), "world": st.integers(1, 9)}


@given(**PLANS)
@settings(max_examples=100, deadline=None)
def test_each_pair_once_no_row_too_long_every_rank_the_same_steps(tokens: list[int], world: int) -> None:
    plan = plan_step(np.array(tokens), world, 256)
    assert all(len(micro_step) == world for micro_step in plan)
    rows = [row for micro_step in plan for row in micro_step]
    assert sorted(i for row in rows for i in row) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in row) <= 256 for row in rows)


@given(**PLANS)
@settings(max_examples=50, deadline=None)
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


def test_a_pair_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(DataError, match=r"300 tokens .* max_tokens_per_row is 256"):
        plan_step(np.array([10, 300]), 2, 256)


def test_row_lengths() -> None:
    lengths = np.array([[5, 3, 2], [1, 1, 1]])
    assert row_lengths(lengths, share_prefix=True).tolist() == [10, 3]
    assert row_lengths(lengths, share_prefix=False).tolist() == [15, 4]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_row_scores_exactly_the_completions(share_prefix: bool) -> None:
    pairs = random_pairs(6, seed=3)
    row = build_row(pairs, range(6), share_prefix)
    assert len(row.input_ids) == len(row.position_ids) == sum(s.length for s in row.segments)
    assert len(row.input_ids) == row_lengths(np.array([[len(x) for x in p] for p in pairs]), share_prefix).sum()
    completion = np.repeat(np.arange(12), row.part_lengths.sum(1))
    for k, pair in enumerate(pairs):
        answers = (pair.chosen_ids, pair.rejected_ids)
        for side, answer in enumerate(answers):
            assert row.part_lengths[2 * k + side, 0] == min(len(each) for each in answers)
            scored = completion == 2 * k + side
            assert row.targets[scored].tolist() == answer.tolist()
            # the source of the i-th completion token sits at position p - 1 + i of its own sequence
            first = len(pair.prompt_ids) - 1
            assert row.position_ids[row.score_from[scored]].tolist() == list(range(first, first + len(answer)))
    assert row.logical_tokens == sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)


def test_segments_follow_one_another_and_point_to_their_prompts() -> None:
    pairs = random_pairs(4, seed=5)
    row = build_row(pairs, range(4), share_prefix=True)
    assert [s.start for s in row.segments] == np.cumsum([0] + [s.length for s in row.segments[:-1]]).tolist()
    for prompt, chosen, rejected in zip(row.segments[::3], row.segments[1::3], row.segments[2::3]):
        assert prompt.prefix_length == 0
        for completion in (chosen, rejected):
            assert (completion.prefix_start, completion.prefix_length) == (prompt.start, prompt.length)


def test_a_dummy_row_has_no_pairs() -> None:
    row = dummy_row(share_prefix=True)
    assert len(row.pairs) == 0 and row.logical_tokens == 0 and len(row.part_lengths) == 2
