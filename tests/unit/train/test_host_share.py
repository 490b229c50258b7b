"""The share of a step in which the host was not ahead of the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
import torch

from dsdpo.train.host_share import HostShare, recorder


@dataclass
class Device:
    """A queue of work, on a clock that the test turns: a piece starts when it is queued and the one before is done."""

    now: float = 0.0
    free_at: float = 0.0
    waited: float = field(default=0.0)

    def queue(self, host: float, work: float) -> None:
        """The host takes `host` seconds to queue `work` seconds."""
        self.now += host
        self.waited += max(0.0, self.now - self.free_at)
        self.free_at = max(self.free_at, self.now) + work

    def record(self) -> Event:
        return Event(self, self.free_at)


@dataclass
class Event:
    device: Device
    at: float

    def query(self) -> bool:
        return self.device.now >= self.at


def share_of(steps: int, host: float, work: float) -> tuple[float | None, float]:
    """The share as it is measured over equal pieces, and the device's true one, from the second piece on."""
    device = Device()
    share = HostShare(device.record, lambda: device.now)
    device.queue(host, work)
    device.waited, began = 0.0, device.now
    for _ in range(steps):
        share.mark()
        device.queue(host, work)
    share.mark()
    return share.take(), device.waited / (device.now - began)


def test_a_host_that_stays_ahead_costs_nothing() -> None:
    assert share_of(20, host=1.0, work=3.0) == (0.0, 0.0)


def test_a_device_that_catches_up_each_time_is_told_in_full() -> None:
    measured, true = share_of(20, host=3.0, work=1.0)
    assert measured == 1.0 and true == pytest.approx(2 / 3)  # an upper bound


def test_the_share_begins_anew_when_it_is_taken_and_leaves_out_pauses() -> None:
    device = Device()
    share = HostShare(device.record, lambda: device.now)
    share.mark()
    device.queue(1.0, 10.0)
    share.mark()  # nothing was queued before the first mark
    device.queue(3.0, 1.0)
    share.mark()
    assert share.take() == pytest.approx(1 / 4)
    assert share.take() is None
    share.pause()
    device.queue(100.0, 0.0)  # an evaluation
    share.mark()
    device.queue(1.0, 5.0)
    share.mark()
    assert share.take() == 1.0


def test_there_is_none_on_a_cpu() -> None:
    share = HostShare(recorder(torch.device("cpu")))
    share.mark()
    share.mark()
    assert share.take() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("slow_host", [True, False])
def test_on_a_gpu(slow_host: bool) -> None:
    """A host that sleeps lets the GPU run dry; one that queues large products does not."""
    size = 64 if slow_host else 8192
    matrix = torch.randn(size, size, device="cuda")
    share = HostShare(recorder(matrix.device))
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    for number in range(6):
        if number == 1:
            share.take()  # the first stretch begins with nothing queued
        share.mark()
        matrix @ matrix
        if slow_host:
            time.sleep(0.02)
    share.mark()
    measured = share.take()
    torch.cuda.synchronize()
    assert measured is not None and (measured > 0.9 if slow_host else measured < 0.1)
