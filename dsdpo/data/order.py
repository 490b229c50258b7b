"""Which examples make up optimizer step s: a pure function of (seed, step), the same on every number of ranks.

The order of an epoch is a keyed permutation of 0 … n-1: a balanced Feistel network over the smallest even number of
bits that covers n, with cycle walking for values that fall outside (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). It needs no table, so 10^8 examples cost nothing and any step can be sought at once.
"""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 6
_HASH_KEY = 2**32 - 2  # an epoch number that training never reaches


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64's finalizer over `values` plus `key`: uint64 in, uint64 out."""
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> list[int]:
    state = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, dtype=np.uint64)
    return [int(key) for key in state]


def keyed_hash(values: np.ndarray, seed: int) -> np.ndarray:
    """uint64 values in an order that depends on the seed alone: equal values stay equal, others differ."""
    first, second, *_ = _round_keys(seed, _HASH_KEY)
    return _mix(_mix(values.astype(np.uint64), first), second)


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Map positions of an epoch to example ids.

    Args:
        positions: integers in [0, n), any shape.
        n: number of examples.
        seed, epoch: the key; another seed or epoch gives another order.

    Returns:
        int64 array of the same shape; over all positions a permutation of 0 … n-1.
    """
    half = max(1, math.ceil(max(1, (n - 1).bit_length()) / 2))
    mask = np.uint64((1 << half) - 1)
    keys = _round_keys(seed, epoch)

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return (left << np.uint64(half)) | right

    ids = encrypt(np.asarray(positions, dtype=np.uint64))
    while (outside := ids >= np.uint64(n)).any():
        ids[outside] = encrypt(ids[outside])
    return ids.astype(np.int64)


def steps_per_epoch(n: int, train_batch_size: int) -> int:
    """Optimizer steps in one pass over n examples; the last step may hold fewer."""
    return math.ceil(n / train_batch_size)


def step_example_ids(step: int, n: int, train_batch_size: int, seed: int) -> np.ndarray:
    """Example ids of optimizer step `step` (0-based, over all epochs): int64, train_batch_size or fewer."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n, train_batch_size))
    start = step_in_epoch * train_batch_size
    positions = np.arange(start, min(start + train_batch_size, n))
    return permute(positions, n, seed, epoch)


def examples_of_steps(total_steps: int, n: int, train_batch_size: int, seed: int) -> np.ndarray:
    """The examples that the first `total_steps` steps use, each once: int64, all n of them from one epoch on."""
    if total_steps >= steps_per_epoch(n, train_batch_size):
        return np.arange(n)
    return permute(np.arange(total_steps * train_batch_size), n, seed, epoch=0)
