"""Reports each step when the next one is under way, and stops the run where a number is not finite."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepspeed import comm

from dsdpo.data.loader import Batch
from dsdpo.errors import IOFailure, NumericError
from dsdpo.train.metrics import StepVector, memory_peak_gb

if TYPE_CHECKING:
    from dsdpo.train.setup import Session

_NAMED_PAIRS = 8


@dataclass(frozen=True)
class StepEnd:
    """What is known when a step's kernels have been queued.

    Attributes:
        step: 1-based: optimizer steps taken.
        batch: its pairs.
        vector: its sums, reduced but not read.
        row_losses: fp32 [P] for each of this rank's rows.
        learning_rate: that the step used.
        seconds: since the step before was queued and the one before that was done, without evaluations and saves: on
            average what a step takes on the device, the optimizer and the wait for data included.
    """

    step: int
    batch: Batch
    vector: StepVector
    row_losses: list[torch.Tensor]
    learning_rate: float
    seconds: float


class StepLog:
    """Holds back one step, so that reading its numbers does not wait for the device.

    Attributes:
        stopping: whether a step that was reported carried a request to stop.
    """

    def __init__(self, session: Session) -> None:
        self.stopping = False
        self._session = session
        self._held: StepEnd | None = None

    def end(self, step_end: StepEnd) -> None:
        """Hold this step; the one held before has been flushed."""
        self._held = step_end

    def flush(self) -> None:
        """Report the held step, when the device is through with it; before a save, so that no state that is not finite
        is ever written.

        Raises:
            NumericError: on all ranks alike.
            IOFailure: so is this; a checkpoint that is written beside the training has failed.
        """
        held, self._held = self._held, None
        if held is None:
            return
        totals = held.vector.read()
        grad_norm = totals.grad_norm
        session = self._session
        if totals.bad_losses or not math.isfinite(grad_norm):
            with session.watch.slow("the checkpoint before"), suppress(IOFailure):  # it is finite, and not to be lost
                session.saver.finish()
            raise NumericError(self._diagnose(held, totals.bad_losses, grad_norm))
        self.stopping = self.stopping or totals.stop
        with session.watch.slow("a checkpoint"):
            if session.saver.poll(held.step, totals.written, totals.failed):
                session.check_room(held.step)
        session.reporter.step(
            {
                "step": held.step,
                "epoch": held.step / session.steps_per_epoch,
                **totals.means,
                "grad_norm": grad_norm,
                "learning_rate": held.learning_rate,
                "logical_tokens_per_second": held.batch.logical_tokens / held.seconds,
                "physical_tokens_per_second": held.batch.physical_tokens / held.seconds,
                "idle_share": held.batch.idle_share,
                "step_time": held.seconds,
                "memory_peak_gb": memory_peak_gb(session.hardware.device),
            }
        )

    def _diagnose(self, held: StepEnd, bad_losses: int, grad_norm: float) -> str:
        """Name the step and the pairs. A collective call: every rank knows only its own rows' losses."""
        mine: list[int] = []
        for row, losses in zip(held.batch.rows, held.row_losses):
            mine += held.batch.pair_ids[row.pairs[(~torch.isfinite(losses)).cpu().numpy()]].tolist()
        everyone: list[list[int]] = [[] for _ in range(comm.get_world_size())]
        comm.all_gather_object(everyone, mine)
        if bad_losses:
            found = f"the loss of {bad_losses} pairs is not finite"
            ids = sorted(i for part in everyone for i in part)
        else:
            found = f"the gradient norm is {grad_norm}, every loss is finite"
            ids = sorted(held.batch.pair_ids.tolist())
        pairs = self._session.loader.pairs
        named = ", ".join(f"{i} ({pairs.where(i)})" for i in ids[:_NAMED_PAIRS])
        more = f" and {len(ids) - _NAMED_PAIRS} more" if len(ids) > _NAMED_PAIRS else ""
        return (
            f"step {held.step}: {found}; pair ids {named}{more}. Nothing was saved after it. "
            "A lower learning_rate, a longer warmup_ratio or fp32 may help; so may a look at these pairs"
        )
