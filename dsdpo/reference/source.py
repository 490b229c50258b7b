"""Reference log-probs for the training step: looked up, or computed live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.loader import Batch, BatchLoader
from dsdpo.engine.engine import Hardware, build_reference_engine, held_here
from dsdpo.model.adapters import reference_weights
from dsdpo.model.packed import PackedInputs
from dsdpo.objectives.sums import completion_sums
from dsdpo.reference.precompute import find_or_compute, open_store
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.stop import StopFlag


class Reference(Protocol):
    """Where the training step gets reference log-probs from."""

    def logps(self, batch: Batch) -> torch.Tensor | None:
        """fp32 [N, 2]: sums over the completions of a batch as `completion_sums` gives them.

        Those of this rank's micro-batches are there, others may be 0. None where there is no reference. A collective
        call when the reference is live.
        """
        ...


class NoReference:
    """For objectives that need none."""

    def logps(self, batch: Batch) -> None:
        """None."""
        return None


class StoredReference:
    """Reference log-probs of the examples of one prepared set, all in memory: 16 bytes a pair and 8 an example.

    Args:
        starts: int64 [examples of the set], where an example's completions begin in `logps`.
        logps: fp32 [N, 2].
        device: where the training step wants them.
    """

    def __init__(self, starts: np.ndarray, logps: np.ndarray, device: torch.device) -> None:
        self._starts = starts
        self._logps = logps
        self._device = device

    def logps(self, batch: Batch) -> torch.Tensor:
        """Looked up."""
        lengths = batch.lengths
        number = np.arange(len(lengths.completions)) - np.repeat(lengths.starts, lengths.counts)
        at = np.repeat(self._starts[batch.example_ids], lengths.counts) + number
        return torch.from_numpy(self._logps[at]).to(self._device, non_blocking=True)


class LiveReference:
    """Computed in every step, by the policy's own engine without its adapter or by a frozen engine beside it.

    Args:
        engine: of the policy, when it has an adapter; else one of `build_reference_engine`.
        device: of the engine.
    """

    def __init__(self, engine: DeepSpeedEngine, device: torch.device) -> None:
        self._engine = engine
        self._device = device

    def logps(self, batch: Batch) -> torch.Tensor:
        """A forward pass without gradients over each micro-batch, in eval mode."""
        engine, trains = self._engine, self._engine.training
        found = torch.zeros(len(batch.lengths.completions), 2, device=self._device)
        engine.eval()
        with torch.no_grad(), reference_weights(engine.module.model):
            for micro_batch in batch.micro_batches:
                output = engine(PackedInputs.of(micro_batch, self._device))
                at = torch.from_numpy(batch.completion_indices(micro_batch)).to(self._device, non_blocking=True)
                found[at] = completion_sums(output, micro_batch.completions)[:, :2]
        engine.train(trains)
        return found


def reference_source(
    kind: Literal["cached", "live", "none"],
    config: RunConfig,
    zero: ZeroConfig,
    mesh: Mesh,
    hardware: Hardware,
    engine: DeepSpeedEngine,
    say: Callable[[str], None],
    stop: StopFlag | None = None,
) -> Callable[[BatchLoader, np.ndarray], Reference]:
    """How a run gets the reference of a set: a function of the set's loader and the examples that will be asked for.

    Args:
        kind: as `reference` in the run config.
        engine: the untrained policy.
        say: where progress is told.
        stop: true once this rank is asked to stop.
    """
    if kind == "none":
        return lambda loader, ids: NoReference()
    if kind == "live":
        frozen = engine
        if config.finetuning_type != "lora":
            frozen = build_reference_engine(config, zero, mesh, hardware)
            say(f"reference: a frozen engine, {held_here(frozen)}")
        live = LiveReference(frozen, hardware.device)
        return lambda loader, ids: live
    store = open_store(config, mesh, hardware)

    def stored(loader: BatchLoader, ids: np.ndarray) -> Reference:
        return StoredReference(
            *find_or_compute(loader, ids, store, lambda: engine, hardware.device, say, stop), hardware.device
        )

    return stored
