"""What stands for a pair in the reference store: it must not change, or stored log-probs are lost."""

from __future__ import annotations

import numpy as np

from dsdpo.data.digest import pair_digest


def test_the_digest_is_the_one_that_stores_hold() -> None:
    parts = ([1, 2], [3], [49151, 4])
    assert pair_digest(parts).hex() == "c748b81cfdec68e0a20d0d58025dc3f5"
    for dtype in (np.int64, np.int32):
        assert pair_digest([np.array(part, dtype=dtype) for part in parts]) == pair_digest(parts)


def test_digests_tell_where_the_parts_meet() -> None:
    pairs = (([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [4], [3]), ([1, 2], [3, 4], []))
    assert len({pair_digest(pair) for pair in pairs}) == len(pairs)
