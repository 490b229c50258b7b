"""Numbers of tokens of examples with any number of completions."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from dsdpo.data.example import Lengths
from tests.helpers.tiny import random_examples


@pytest.mark.parametrize("indices", [[], [4], [5, 0, 3], [2, 2]])
def test_some_of_the_examples_in_the_order_asked_for(indices: list[int]) -> None:
    examples = random_examples(6, counts=(1, 3, 2), masks=True, empty=True)
    selected, expected = Lengths.of(examples).select(indices), Lengths.of([examples[i] for i in indices])
    for field in fields(Lengths):
        np.testing.assert_array_equal(getattr(selected, field.name), getattr(expected, field.name))


def test_a_table_has_the_prompt_first() -> None:
    table = np.array([[5, 2, 3], [7, 4, 1]])
    lengths = Lengths.from_table(table)
    np.testing.assert_array_equal(lengths.per_pair, table)
    np.testing.assert_array_equal(lengths.loss_tokens, [2, 3, 4, 1])
    np.testing.assert_array_equal(lengths.packed(share_prefix=True), [10, 12])
    np.testing.assert_array_equal(lengths.packed(share_prefix=False), [15, 19])
