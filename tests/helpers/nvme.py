"""DeepSpeed's op that reads and writes NVMe."""

from __future__ import annotations

from dsdpo.compat import can_swap
from dsdpo.runtime.builds import end_stale_builds, rebuild_broken_kernels


def built_async_io() -> bool:
    """Whether the op is there: built now, which takes minutes, so that no rank's time limit has to hold it."""
    if not can_swap():
        return False
    from deepspeed.ops.op_builder import AsyncIOBuilder

    end_stale_builds()
    rebuild_broken_kernels()
    AsyncIOBuilder().load(verbose=False)
    return True
