import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.data.order import Order, examples_of_steps, permute, step_example_ids, steps_per_epoch
from dsdpo.errors import DataError


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@settings(max_examples=60)
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


@given(n=st.integers(1, 300), batch=st.integers(1, 50), epoch=st.integers(0, 3))
@settings(max_examples=60)
def test_the_steps_of_an_epoch_hold_each_pair_once(n: int, batch: int, epoch: int) -> None:
    per_epoch = steps_per_epoch(n, batch)
    steps = [step_example_ids(epoch * per_epoch + s, n, batch, seed=7) for s in range(per_epoch)]
    assert sorted(np.concatenate(steps)) == list(range(n))
    assert [len(ids) for ids in steps[:-1]] == [batch] * (per_epoch - 1)


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_the_order_never_changes() -> None:
    """Golden values: a resumed run of an older version must see the same pairs."""
    assert step_example_ids(0, 100, 8, 42).tolist() == [63, 50, 80, 70, 98, 71, 89, 85]


def test_neighbours_do_not_stay_neighbours() -> None:
    ids = permute(np.arange(10_000), 10_000, 3, 0)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
    assert (np.abs(np.diff(ids)) == 1).mean() < 0.002


def test_a_step_of_a_huge_set_needs_no_table() -> None:
    ids = step_example_ids(1_000_000, 10**8, 64, seed=1)
    assert len(set(ids.tolist())) == 64 and ids.max() < 10**8


def test_the_pairs_that_a_short_run_uses() -> None:
    used = examples_of_steps(3, 100, 8, seed=5)
    assert len(used) == len(set(used.tolist())) == 24
    assert used[8:16].tolist() == step_example_ids(1, 100, 8, 5).tolist()
    assert examples_of_steps(13, 100, 8, seed=5).tolist() == list(range(100))


# --- several sets ---

SIZES, PROBS = (50, 10, 200), (0.5, 0.25, 0.25)


def taken(order: Order, epochs: int, batch: int = 16) -> list[np.ndarray]:
    """The ids of each epoch."""
    steps = order.steps_per_epoch(batch)
    return [np.concatenate([order.step_ids(e * steps + s, batch, seed=3) for s in range(steps)]) for e in range(epochs)]


@pytest.mark.parametrize(
    ("strategy", "quotas"), [("interleave_under", (20, 10, 10)), ("interleave_over", (400, 200, 200))]
)
def test_an_epoch_takes_each_set_in_its_share(strategy: str, quotas: tuple[int, ...]) -> None:
    order = Order.of(SIZES, strategy, PROBS)
    assert order.quotas == quotas and len(order) == sum(quotas)
    epochs = taken(order, 30)
    bounds = np.cumsum((0, *SIZES))
    for ids in epochs:
        assert np.histogram(ids, bounds)[0].tolist() == list(quotas)
    counts = np.bincount(np.concatenate(epochs), minlength=sum(SIZES))
    for start, end in itertools.pairwise(bounds):
        assert np.ptp(counts[start:end]) <= 1, "an example is taken more often than others of its set"
    assert not np.array_equal(epochs[0], epochs[1])
    mixed = epochs[0][: len(order) // 4]
    assert (np.histogram(mixed, bounds)[0] > 0).all(), "the sets come one after another"


def test_a_mix_without_shares_and_the_examples_that_it_uses() -> None:
    order = Order.of((5, 20), "interleave_under")
    assert order.quotas == (5, 5)
    used = order.ids_of_steps(7, 4, seed=1)
    assert used.tolist() == sorted({*np.concatenate([order.step_ids(step, 4, seed=1) for step in range(7)]).tolist()})


def test_a_set_without_examples_is_not_mixed() -> None:
    for sizes in ((5, 0), (0, 5), (5, 0, 7)):
        with pytest.raises(DataError, match=f"set {sizes.index(0) + 1} "):
            Order.of(sizes, "interleave_over")
        assert len(Order.of(sizes)) == sum(sizes)


def test_several_sets_without_a_mix_are_one() -> None:
    order = Order.of((30, 70))
    assert (len(order), order.steps_per_epoch(8)) == (100, steps_per_epoch(100, 8))
    for step in (0, 5, 12, 40):
        assert np.array_equal(order.step_ids(step, 8, 42), step_example_ids(step, 100, 8, 42))
    assert np.array_equal(order.ids_of_steps(3, 8, 5), examples_of_steps(3, 100, 8, 5))
