import numpy as np
import pytest

from dsdpo.data.loader import PairLoader
from dsdpo.runtime.env import Mesh
from tests.helpers.tiny import ListOfPairs, random_pairs

PAIRS = ListOfPairs(random_pairs(50))


def loader(rank: int, world_size: int, row: int = 256, share_prefix: bool = True, sp_size: int = 1) -> PairLoader:
    return PairLoader(PAIRS, Mesh(rank, world_size, rank, sp_size), row, share_prefix)


@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
def test_the_ranks_rows_hold_each_pair_of_a_step_once(world_size: int) -> None:
    ids = np.arange(10, 26)
    batches = [loader(rank, world_size).batch(ids) for rank in range(world_size)]
    assert len({len(batch.rows) for batch in batches}) == 1
    seen = [i for batch in batches for row in batch.rows for i in batch.pair_ids[row.pairs].tolist()]
    assert sorted(seen) == ids.tolist()
    assert sum(row.logical_tokens for batch in batches for row in batch.rows) == batches[0].logical_tokens


def test_ranks_of_a_sequence_parallel_group_have_the_same_rows() -> None:
    """Those of data-parallel rank r, as it would have them alone."""
    ids = np.arange(10, 26)
    alone = [loader(rank, 3).batch(ids) for rank in range(3)]
    for rank in range(6):
        batch, expected = loader(rank, 6, sp_size=2).batch(ids), alone[rank // 2]
        assert [row.input_ids.tolist() for row in batch.rows] == [row.input_ids.tolist() for row in expected.rows]
        assert [row.pairs.tolist() for row in batch.rows] == [row.pairs.tolist() for row in expected.rows]
        assert (batch.physical_tokens, batch.idle_share) == (expected.physical_tokens, expected.idle_share)
    assert len({str([row.pairs.tolist() for row in batch.rows]) for batch in alone}) == 3


def test_the_stream_equals_single_batches_from_any_step() -> None:
    whole = list(loader(0, 2).training_batches(range(0, 20), 8, seed=1))
    late = list(loader(0, 2).training_batches(range(13, 20), 8, seed=1))
    for a, b in zip(whole[13:], late, strict=True):
        assert a.pair_ids.tolist() == b.pair_ids.tolist()
        assert [r.input_ids.tolist() for r in a.rows] == [r.input_ids.tolist() for r in b.rows]


def test_an_error_while_streaming_reaches_the_caller() -> None:
    with pytest.raises(IndexError):
        list(loader(0, 1).stream([np.array([0]), np.array([50])]))


def test_in_order_takes_each_pair_once() -> None:
    batches = list(loader(0, 1).in_order(np.arange(50), 8))
    assert np.concatenate([b.pair_ids for b in batches]).tolist() == list(range(50))


def test_mean_chosen_tokens_is_over_the_whole_step() -> None:
    ids = np.arange(12)
    expected = np.mean([len(PAIRS.pair(i).chosen_ids) for i in ids])
    assert {loader(rank, 3).batch(ids).mean_chosen_tokens for rank in range(3)} == {expected}
