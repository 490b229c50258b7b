"""128 bits that stand for a pair's token ids: reference log-probs are stored and found by them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

DIGEST_BYTES = 16
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


def pair_digest(pair: Iterable[Sequence[int] | np.ndarray]) -> bytes:
    """Digest of a pair's prompt, chosen and rejected ids; the lengths keep [1,2],[3] and [1],[2,3] apart."""
    parts = [np.asarray(ids, dtype="<i8") for ids in pair]
    lengths = np.array([len(ids) for ids in parts], dtype="<i8")
    return hashlib.blake2b(np.concatenate([lengths, *parts]).tobytes(), digest_size=DIGEST_BYTES).digest()
