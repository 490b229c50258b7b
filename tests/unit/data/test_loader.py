import numpy as np
import pytest

from dsdpo.data.loader import BatchLoader
from dsdpo.runtime.env import Mesh
from tests.helpers.tiny import ListOfExamples, random_examples

EXAMPLES = ListOfExamples(random_examples(50, counts=(2, 1, 4)))


def loader(rank: int, world_size: int, tokens: int = 256, share_prefix: bool = True, sp_size: int = 1) -> BatchLoader:
    return BatchLoader(EXAMPLES, Mesh(rank, world_size, rank, sp_size), tokens, share_prefix)


@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
def test_the_ranks_micro_batches_hold_each_example_of_a_step_once(world_size: int) -> None:
    ids = np.arange(10, 26)
    batches = [loader(rank, world_size).batch(ids) for rank in range(world_size)]
    assert len({len(batch.micro_batches) for batch in batches}) == 1
    parts = [(batch, micro_batch) for batch in batches for micro_batch in batch.micro_batches]
    seen = [i for batch, micro_batch in parts for i in batch.example_ids[micro_batch.examples].tolist()]
    assert sorted(seen) == ids.tolist()
    lengths = EXAMPLES.lengths(ids)
    assert {batch.packing.logical_tokens for batch in batches} == {lengths.padded}
    assert {batch.packing.physical_tokens for batch in batches} == {lengths.packed(share_prefix=True).sum()}
    held = sum(len(m.input_ids) for _, m in parts if len(m.completions))
    assert held == batches[0].packing.physical_tokens


def test_ranks_of_a_sequence_parallel_group_have_the_same_micro_batches() -> None:
    """Those of data-parallel rank r, as it would have them alone."""
    ids = np.arange(10, 26)
    alone = [loader(rank, 3).batch(ids) for rank in range(3)]
    for rank in range(6):
        batch, expected = loader(rank, 6, sp_size=2).batch(ids), alone[rank // 2]
        found, wanted = batch.micro_batches, expected.micro_batches
        assert [m.input_ids.tolist() for m in found] == [m.input_ids.tolist() for m in wanted]
        assert [m.completions.tolist() for m in found] == [m.completions.tolist() for m in wanted]
        assert batch.packing == expected.packing
    assert len({str([m.examples.tolist() for m in batch.micro_batches]) for batch in alone}) == 3


def test_the_stream_equals_single_batches_from_any_step() -> None:
    whole = list(loader(0, 2).training_batches(range(0, 20), 8, seed=1))
    late = list(loader(0, 2).training_batches(range(13, 20), 8, seed=1))
    for a, b in zip(whole[13:], late, strict=True):
        assert a.example_ids.tolist() == b.example_ids.tolist()
        assert [m.input_ids.tolist() for m in a.micro_batches] == [m.input_ids.tolist() for m in b.micro_batches]


def test_an_error_while_streaming_reaches_the_caller() -> None:
    with pytest.raises(IndexError):
        list(loader(0, 1).stream([(np.array([0]), None), (np.array([50]), None)]))


def test_in_order_takes_each_example_once() -> None:
    batches = list(loader(0, 1).in_order(np.arange(50), 8))
    assert np.concatenate([b.example_ids for b in batches]).tolist() == list(range(50))


def test_means_per_token_are_over_the_whole_step_or_what_is_given() -> None:
    ids = np.arange(12)
    expected = [n for i in ids for n in EXAMPLES.example(i).loss_tokens]
    everything = loader(0, 3).mean_over(np.arange(50))
    for rank in range(3):
        assert loader(rank, 3).batch(ids).mean_over.lengths.loss_tokens.tolist() == expected
        assert loader(rank, 3).batch(ids, mean_over=everything).mean_over is everything


def test_completions_are_found_among_those_of_the_batch() -> None:
    ids = np.array([3, 30, 4, 17, 8, 5, 44])
    tokens = EXAMPLES.lengths(ids).loss_tokens
    seen: list[int] = []
    for rank in range(2):
        batch = loader(rank, 2).batch(ids)
        for micro_batch in batch.micro_batches:
            at = batch.completion_indices(micro_batch)
            assert tokens[at].tolist() == micro_batch.completions[:, 2].tolist()
            seen += at.tolist()
    assert sorted(seen) == list(range(len(tokens)))
