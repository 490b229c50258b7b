"""What one rank finds out, all ranks must know: an error on one alone would leave the others waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from deepspeed import comm

from dsdpo.errors import DsdpoError, IOFailure

T = TypeVar("T")


def all_gather_object(value: Any) -> list[Any]:
    """What each rank gives, in the order of the ranks. A collective call.

    For what is small: with NCCL each GPU holds as many times the largest as there are ranks.
    """
    everyone: list[Any] = [None] * comm.get_world_size()
    comm.all_gather_object(everyone, value)
    return everyone


def raise_on_any_rank(work: Callable[[], T]) -> T:
    """Do some work on each rank; where it fails on one, it fails on all. A collective call.

    Returns:
        This rank's result.

    Raises:
        DsdpoError: that of the first rank on which the work failed; IOFailure for an OSError.
    """
    result: T | None = None
    error: DsdpoError | None = None
    try:
        result = work()
    except DsdpoError as caught:
        error = caught
    except OSError as caught:
        error = IOFailure(f"{caught.filename or 'a file'}: {caught.strerror or caught}")
    for rank, found in enumerate(all_gather_object(error)):
        if found is not None:
            raise found if rank == 0 else found.found_by(f"rank {rank}")
    return result  # type: ignore[return-value]


def run_on_main(is_main: bool, work: Callable[[], T]) -> T:
    """Do some work on the main rank; all ranks get what it gives, or its error. A collective call."""
    result: list[Any] = [raise_on_any_rank(work if is_main else lambda: None)]
    comm.broadcast_object_list(result, src=0)
    return result[0]


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether it is true on a rank. A collective call."""
    count = torch.tensor(float(value), device=device)
    comm.all_reduce(count)
    return bool(count.item() > 0)
