"""A step between its last kernel and its report."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsdpo.data.loader import Batch
from dsdpo.train.metrics import MetricSums, StepTotals, memory_peak_gb


@dataclass(frozen=True)
class QueuedStep:
    """What is known of a step when its kernels have been queued.

    Attributes:
        done: optimizer steps taken with it.
        batch: its examples.
        sums: its metrics, reduced but not read.
        learning_rate: that it used.
        scaling: what metrics.jsonl says of the loss scale; empty outside of fp16.
        seconds: since the step before was queued and the one before that was done, without evaluations and saves: on
            average what a step takes on the device, the optimizer and the wait for data included.
        host_share: see `HostShare`; None on the CPU.
    """

    done: int
    batch: Batch
    sums: MetricSums
    learning_rate: float
    scaling: dict[str, float]
    seconds: float
    host_share: float | None = None

    def remarks(self, updated: bool) -> list[str]:
        """Lines for the reader. updated: whether a token of its examples is in the loss."""
        if not updated:
            return [f"step {self.done}: no token of its examples is in the loss; nothing was updated"]
        if times := int(self.scaling.get("computed_again", 0)):
            scale = self.scaling["loss_scale"]
            return [f"step {self.done}: gradients overflowed, computed again ({times}x) down to loss scale {scale:g}"]
        return []

    def record(self, totals: StepTotals, updated: bool, epoch: float, device: torch.device) -> dict[str, float]:
        """Its line of metrics.jsonl. epoch: epochs that have been trained on with it."""
        packing = self.batch.packing
        return {
            **({} if updated else {"skipped": 1.0}),
            "step": self.done,
            "epoch": epoch,
            **totals.means,
            "grad_norm": totals.grad_norm,
            "learning_rate": self.learning_rate,
            **self.scaling,
            "logical_tokens_per_second": packing.logical_tokens / self.seconds,
            "physical_tokens_per_second": packing.physical_tokens / self.seconds,
            "idle_share": packing.idle_share,
            "step_time": self.seconds,
            "memory_peak_gb": memory_peak_gb(device),
            **({} if self.host_share is None else {"host_share": self.host_share}),
        }
