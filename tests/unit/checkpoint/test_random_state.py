"""Random states into a checkpoint and back."""

from __future__ import annotations

import random

import numpy as np
import torch

from dsdpo.checkpoint.random_state import random_keys, random_state, seed_anew, set_random_state


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1)), float(torch.randn(1)), random.gauss(0, 1)]


def test_a_state_that_is_put_back_draws_the_same() -> None:
    seed_anew(1, 2, 3)
    draw()
    state = random_state()
    expected = [draw() for _ in range(3)]
    seed_anew(9, 9, 9)
    set_random_state({key: state[key] for key in random_keys(set(state))})
    assert [draw() for _ in range(3)] == expected


def test_states_for_other_ranks_are_a_function_of_seed_step_and_rank() -> None:
    def first(*key: int) -> list[float]:
        seed_anew(*key)
        return draw()

    keys = [(1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0)]
    assert first(*keys[0]) == first(*keys[0]) and len({tuple(first(*key)) for key in keys}) == 4
