"""Rows of a tensor, copied to where they are needed; gradients are gathered and summed in a fixed order.

The backward pass of index_select adds with atomics on a GPU: the order of its sums, and so its bits, change from run to
run, and it is slow where rows are long. Here each row knows its copies, so that its gradient is a sum of gathered rows.

Shape suffixes: T rows, K copies, R numbers in a row.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable


class CopiesOfRows(NamedTuple):
    """Where the copies of rows are.

    Attributes:
        groups: (n, int64 [n * N]) for the N rows with n copies each: the place of the first copy of every row, then of
            the second, and so on.
        order: int64 [T], where a row is once the groups stand one after another; rows without a copy stand last, as one
            row of zeros. None: rows stand in their own order.
    """

    groups: list[tuple[int, torch.Tensor]]
    order: torch.Tensor | None


class RowGather:
    """Copies rows: row `index[k]` of its input becomes row k of its output.

    Args:
        index: int64 [K]; rows may repeat and may be missing.
        rows: T, of the input.
        device: of input and output.
    """

    def __init__(self, index: np.ndarray, rows: int, device: torch.device) -> None:
        self._index, self._rows, self._device = index, rows, device

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [K]."""
        return torch.from_numpy(self._index).to(self._device, non_blocking=True)

    @cached_property
    def copies(self) -> CopiesOfRows:
        """What the backward pass needs; made at first use, copied to the device at once."""
        counts = np.bincount(self._index, minlength=self._rows)
        by_row = np.argsort(self._index, kind="stable")
        starts = np.cumsum(counts) - counts
        order = np.full(self._rows, np.count_nonzero(counts))  # the row of zeros
        sizes, parts, done = [], [], 0
        for count in np.unique(counts[counts > 0]).tolist():
            own = np.flatnonzero(counts == count)
            parts.append(by_row[starts[own] + np.arange(count)[:, None]].reshape(-1))
            order[own] = np.arange(done, done + len(own))
            sizes.append(count)
            done += len(own)
        in_order = done == self._rows and len(sizes) == 1
        lengths = [*map(len, parts), 0 if in_order else self._rows]
        together = torch.from_numpy(np.concatenate([*parts, order[: lengths[-1]]]).astype(np.int64))
        *groups, last = together.to(self._device, non_blocking=True).split(lengths)
        return CopiesOfRows(list(zip(sizes, groups)), None if in_order else last)

    def __call__(self, rows_TR: torch.Tensor) -> torch.Tensor:
        """[T, R] -> [K, R]."""
        found: torch.Tensor = _Gather.apply(rows_TR, self)
        return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TR: torch.Tensor, gather: RowGather) -> torch.Tensor:
        """index_select; where the copies are is found here, not on autograd's own thread."""
        if ctx.needs_input_grad[0]:
            ctx.copies = gather.copies
        return rows_TR.index_select(0, gather.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KR: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The sum over each row's copies, taken in fp32 and rounded once."""
        return _sum_copies(grad_KR, ctx.copies), None


def _sum_copies(grad_KR: torch.Tensor, copies: CopiesOfRows) -> torch.Tensor:
    sizes = [len(places) // count for count, places in copies.groups]
    sums = grad_KR.new_empty(sum(sizes) + (copies.order is not None), grad_KR.shape[1])
    for (count, places), part in zip(copies.groups, sums.split([*sizes, *([1] if copies.order is not None else [])])):
        if count == 1:
            torch.index_select(grad_KR, 0, places, out=part)
        else:
            found = grad_KR.index_select(0, places).view(count, len(part), grad_KR.shape[1])
            torch.sum(found, dim=0, out=part)
    if copies.order is None:
        return sums
    sums[-1] = 0.0
    return sums.index_select(0, copies.order)
