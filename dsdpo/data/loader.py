"""The rows of this rank for each optimizer step, streamed from the prepared shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dsdpo.data.order import step_pair_ids
from dsdpo.data.packing import Row, TokenPair, build_row, dummy_row, idle_share, plan_step, row_lengths
from dsdpo.runtime.env import Mesh


class PairSource(Protocol):
    """What the loader reads: a prepared set, or anything with these methods of one."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def lengths(self, ids: np.ndarray) -> np.ndarray: ...

    def digests(self, ids: np.ndarray) -> np.ndarray: ...

    def scores(self, ids: np.ndarray) -> np.ndarray: ...

    def pair(self, index: int) -> TokenPair: ...

    def where(self, index: int) -> str: ...


@dataclass(frozen=True)
class Batch:
    """One optimizer step as this rank sees it.

    Attributes:
        pair_ids: int64 [B], the pairs of the step over all data-parallel ranks.
        lengths: int64 [B, 3], tokens of prompt, chosen and rejected of each.
        score_gaps: float64 [B], the data's score of chosen minus that of rejected; NaN where there are none.
        rows: this rank's rows, one per micro-step; all ranks have the same number.
        logical_tokens: 2p + c + r summed over all B pairs, what padded training would count.
        physical_tokens: tokens in the rows of all data-parallel ranks.
        idle_share: part of the step, in tokens, for which ranks wait for the longest row of their micro-step.
    """

    pair_ids: np.ndarray
    lengths: np.ndarray
    score_gaps: np.ndarray
    rows: list[Row]
    logical_tokens: int
    physical_tokens: int
    idle_share: float

    @property
    def mean_chosen_tokens(self) -> float:
        """Chosen tokens per pair over the whole step."""
        return float(self.lengths[:, 1].mean())


class PairLoader:
    """Batches as a pure function of the pair ids, the number of data-parallel ranks and the row settings.

    Args:
        pairs: the prepared set.
        mesh: this rank's place.
        max_tokens_per_row: longest row.
        share_prefix: whether a pair's prompt stands once in its row.
    """

    def __init__(self, pairs: PairSource, mesh: Mesh, max_tokens_per_row: int, share_prefix: bool) -> None:
        self.pairs = pairs
        self.mesh = mesh
        self.max_tokens_per_row = max_tokens_per_row
        self.share_prefix = share_prefix

    def batch(self, pair_ids: np.ndarray) -> Batch:
        """This rank's rows for one step's pairs."""
        lengths, scores = self.pairs.lengths(pair_ids), self.pairs.scores(pair_ids)
        tokens = row_lengths(lengths, self.share_prefix)
        plan = plan_step(tokens, self.mesh.dp_size, self.max_tokens_per_row)
        rows = [self._row(pair_ids, micro_step[self.mesh.dp_rank]) for micro_step in plan]
        return Batch(
            pair_ids=pair_ids,
            lengths=lengths,
            score_gaps=scores[:, 0] - scores[:, 1],
            rows=rows,
            logical_tokens=int(row_lengths(lengths, share_prefix=False).sum()),
            physical_tokens=int(tokens.sum()),
            idle_share=idle_share(plan, tokens),
        )

    def _row(self, pair_ids: np.ndarray, indices: list[int]) -> Row:
        if not indices:
            return dummy_row(self.share_prefix)
        return build_row([self.pairs.pair(int(pair_ids[i])) for i in indices], indices, self.share_prefix)

    def stream(self, id_batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Batches in order, each built on a thread while the one before it is in use."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = None
            for pair_ids in id_batches:
                following = pool.submit(self.batch, pair_ids)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def training_batches(self, steps: range, train_batch_size: int, seed: int) -> Iterator[Batch]:
        """The batches of optimizer steps `steps`: starting anywhere costs nothing."""
        n = len(self.pairs)
        return self.stream(step_pair_ids(step, n, train_batch_size, seed) for step in steps)

    def in_order(self, pair_ids: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Each of `pair_ids` once, in order: for evaluation and for the reference pass."""
        return self.stream(pair_ids[i : i + batch_size] for i in range(0, len(pair_ids), batch_size))
