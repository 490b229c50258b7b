"""Who attends to whom in a packed row, in the forms that attention kernels ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dsdpo.data.packing import Segment
from dsdpo.model.gather import RowGather


@dataclass
class PackedLayout:
    """The segments of one row. Masks and indices are made at first use and shared by all layers.

    Attributes:
        segments: in row order, together covering the row; a prefix is one whole segment before them.
        device: where masks and indices are made.
    """

    segments: list[Segment]
    device: torch.device
    _masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence: a prefix and the segment that continues it."""
        return max(s.prefix_length + s.length for s in self.segments)

    @cached_property
    def prefix_of(self) -> list[int | None]:
        """For each segment the index of the segment that is its prefix, or None."""
        starting_at = {s.start: i for i, s in enumerate(self.segments)}
        return [starting_at[s.prefix_start] if s.prefix_length else None for s in self.segments]

    def causal_mask(self, queries: int, keys: int) -> torch.Tensor:
        """Causal mask aligned bottom right, bool [queries, keys]: the last query sees every key."""
        if (queries, keys) not in self._masks:
            full = torch.ones(queries, keys, dtype=torch.bool, device=self.device)
            self._masks[queries, keys] = full.tril(keys - queries)
        return self._masks[queries, keys]

    @cached_property
    def keys(self) -> RowGather:
        """The keys of each segment: those of its prefix and its own, [T, R] -> [K, R]."""
        spans = [
            np.arange(begin, begin + length)
            for s in self.segments
            for begin, length in ((s.prefix_start, s.prefix_length), (s.start, s.length))
        ]
        return RowGather(np.concatenate(spans), sum(s.length for s in self.segments), self.device)

    @cached_property
    def varlen(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """What one variable-length call needs beside its keys.

        Returns:
            Cumulative lengths of queries and of keys, int32 [S+1]; the longest query and key length.
        """
        q_lens = np.array([s.length for s in self.segments])
        k_lens = q_lens + [s.prefix_length for s in self.segments]
        ends = np.zeros((2, len(self.segments) + 1), dtype=np.int32)
        np.cumsum([q_lens, k_lens], axis=1, out=ends[:, 1:])
        cu_q, cu_k = torch.from_numpy(ends).to(self.device, non_blocking=True)
        return cu_q, cu_k, int(q_lens.max()), int(k_lens.max())

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask: which blocks of 128 x 128 positions to compute, and which positions inside them."""
        lengths = torch.tensor([s.length for s in self.segments])
        start, prefix_start, prefix_length = (
            torch.tensor(values).repeat_interleave(lengths).to(self.device, non_blocking=True)
            for values in zip(*((s.start, s.prefix_start, s.prefix_length) for s in self.segments))
        )

        def allowed(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            """Whether a row position sees another: in its own segment and not after it, or in its prefix."""
            own = (key >= start[query]) & (key <= query)
            into_prefix = key - prefix_start[query]
            return own | ((into_prefix >= 0) & (into_prefix < prefix_length[query]))

        tokens = int(lengths.sum())
        return create_block_mask(allowed, None, None, tokens, tokens, device=self.device)
