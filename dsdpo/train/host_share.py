"""How much of a step the GPU may have waited for the host, told without a profiler and without waiting for the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch


class DeviceEvent(Protocol):
    """A point in the device's queue."""

    def query(self) -> bool:
        """Whether the device has come past it."""


def recorder(device: torch.device) -> Callable[[], DeviceEvent] | None:
    """Puts an event at the end of what is queued on a device; None for the CPU, which has no queue."""
    if device.type != "cuda":
        return None

    def record() -> DeviceEvent:
        event = torch.cuda.Event()
        event.record()
        return event

    return record


class HostShare:
    """Share of the time in which the device had no work that was queued before: the host was not ahead of it.

    The host marks points of its way through a step, and queues an event at each. Where the device has not come past
    the last event at the next mark, it had work all the time between the two. Where it has, it had caught up, and may
    have waited for the host during as much as that time. So the share is an upper bound of the device's waits, 0 where
    the host stays ahead; its grain is what is queued between two marks.

    Args:
        record: as `recorder` gives it.
        clock: seconds.
    """

    def __init__(
        self, record: Callable[[], DeviceEvent] | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._record, self._clock = record, clock
        self._event: DeviceEvent | None = None
        self._since = self._caught_up = self._total = 0.0

    def mark(self) -> None:
        """The host is here, and queues more from now on."""
        if self._record is None:
            return
        now = self._clock()
        if self._event is not None:
            self._total += now - self._since
            if self._event.query():
                self._caught_up += now - self._since
        self._event, self._since = self._record(), now

    def take(self) -> float | None:
        """The share since the last call; None on the CPU, or without two marks."""
        share = self._caught_up / self._total if self._total > 0 else None
        self._caught_up = self._total = 0.0
        return share

    def pause(self) -> None:
        """What follows until the next mark is no part of a step."""
        self._event = None
