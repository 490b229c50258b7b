import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.data.order import examples_of_steps, permute, step_example_ids, steps_per_epoch


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


@given(n=st.integers(1, 300), batch=st.integers(1, 50), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
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
