"""How glibc hands memory back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, memory of a tensor above 1 MiB goes back to the system when it is freed.

    glibc keeps blocks of up to 32 MiB for later, between those that stay: a model that is quantized tensor by tensor
    then took up to twice its memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        yield
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    mallopt(mmap, 2**20)
    try:
        yield
    finally:
        mallopt(mmap, 2**25)  # where glibc's own adjustment of the two ends
        mallopt(trim, 2**26)
