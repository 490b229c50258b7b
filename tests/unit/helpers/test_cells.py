"""The sample of settings covers what it says."""

from __future__ import annotations

import itertools

from tests.dist.cells import FACTORS, few, is_possible, sample, yardstick

IMPOSSIBLE = [
    *({("objective", objective), ("masks", True)} for objective in ("ranking", "rm")),
    *({("finetuning_type", "full"), ("quantization_bit", bits)} for bits in (4, 8)),
    {("zero", 3), ("quantization_bit", 8)},
]


def test_every_pair_of_values_that_can_be_occurs_and_no_cell_twice() -> None:
    cells = sample()
    assert len(cells) == len(set(cells)) == 40 and all(map(is_possible, cells)) and sample() == cells
    found = {pair for cell in cells for pair in itertools.combinations(zip(FACTORS, cell), 2)}
    for (one, values), (other, others) in itertools.combinations(FACTORS.items(), 2):
        for value, another in itertools.product(values, others):
            can_be = {(one, value), (other, another)} not in IMPOSSIBLE
            assert (((one, value), (other, another)) in found) == can_be
    assert {cell[0] for cell in few(cells)} == set(FACTORS["objective"])
    assert all(is_possible(yardstick(cell)) for cell in cells)
