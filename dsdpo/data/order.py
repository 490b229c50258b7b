"""Which examples make up optimizer step s: a pure function of (seed, step), the same on every number of ranks.

The order of an epoch is a keyed permutation of 0 … n-1: a balanced Feistel network over the smallest even number of
bits that covers n, with cycle walking for values that fall outside (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). It needs no table, so 10^8 examples cost nothing and any step can be sought at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsdpo.errors import DataError

_ROUNDS = 6
_HASH_KEY = 2**32 - 2  # an epoch number that training never reaches
_STEPS = 2**63  # steps have keys beyond those of epochs
_SETS = 2**40  # epochs of a single set have keys beyond those of whole epochs


def mix(values: np.ndarray, key: int) -> np.ndarray:
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
    return mix(mix(values.astype(np.uint64), first), second)


def example_keys(example_ids: np.ndarray, seed: int, step: int) -> np.ndarray:
    """uint64 [B], a key for each example of a step: of what is drawn at random for it."""
    first, second, *_ = _round_keys(seed, _STEPS + step)
    return mix(mix(example_ids.astype(np.uint64), first), second)


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
            left, right = right, left ^ (mix(right, key) & mask)
        return (left << np.uint64(half)) | right

    ids = encrypt(np.asarray(positions, dtype=np.uint64))
    while (outside := ids >= np.uint64(n)).any():
        ids[outside] = encrypt(ids[outside])
    return ids.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which examples the steps take.

    An epoch takes so many examples of each set, in one permutation of all; a set goes on from one epoch to the next
    where it was, so that each of its examples is taken as often as any other, give or take one.

    Attributes:
        sizes: examples of each set; their ids stand one set after another.
        quotas: how many of each an epoch takes.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], mix_strategy: str = "concat", probs: Sequence[float] | None = None) -> Order:
        """The order of a run.

        Args:
            sizes: examples of each set.
            mix_strategy: as in the run config. `interleave_under`: an epoch ends with the set that is used up first,
                `interleave_over`: with the one that is used up last, as `datasets.interleave_datasets` has it.
            probs: share of each set in an epoch; None: the same for all.

        Raises:
            DataError: a set to mix has no example.
        """
        if mix_strategy == "concat":
            return cls((sum(sizes),), (sum(sizes),))
        if not all(sizes):
            raise DataError(
                f"mix_strategy {mix_strategy}: set {list(sizes).index(0) + 1} of dataset has no example to train on; "
                "take it out, or see why its records were dropped"
            )
        weights = np.ones(len(sizes)) if probs is None else np.array(probs, dtype=np.float64)
        shares = weights / weights.sum()
        pick = min if mix_strategy == "interleave_under" else max
        length = pick(size / share for size, share in zip(sizes, shares))
        return cls(tuple(sizes), tuple(max(1, round(length * share)) for share in shares))

    def __len__(self) -> int:
        """Examples of an epoch."""
        return sum(self.quotas)

    def steps_per_epoch(self, train_batch_size: int) -> int:
        """Optimizer steps in an epoch; the last step may hold fewer."""
        return steps_per_epoch(len(self), train_batch_size)

    def step_ids(self, step: int, train_batch_size: int, seed: int) -> np.ndarray:
        """Example ids of optimizer step `step` (0-based, over all epochs): int64, train_batch_size or fewer."""
        ids = step_example_ids(step, len(self), train_batch_size, seed)
        if len(self.sizes) == 1:
            return ids
        epoch = step // self.steps_per_epoch(train_batch_size)
        ends = np.cumsum(self.quotas)
        found = np.empty_like(ids)
        for number, (size, quota, end) in enumerate(zip(self.sizes, self.quotas, ends)):
            mine = np.flatnonzero((ids < end) & (ids >= end - quota))
            rounds, places = np.divmod(epoch * quota + ids[mine] - (end - quota), size)
            for turn in np.unique(rounds):
                now = mine[rounds == turn]
                key = (number + 1) * _SETS + int(turn)  # another permutation than those of whole epochs
                found[now] = sum(self.sizes[:number]) + permute(places[rounds == turn], size, seed, key)
        return found

    def ids_of_steps(self, total_steps: int, train_batch_size: int, seed: int) -> np.ndarray:
        """The examples that the first `total_steps` steps use, each once, int64."""
        if len(self.sizes) == 1:
            return examples_of_steps(total_steps, len(self), train_batch_size, seed)
        steps = (self.step_ids(step, train_batch_size, seed) for step in range(total_steps))
        return np.unique(np.concatenate(list(steps)))


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
