"""Means over held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from dsdpo.data.loader import BatchLoader
from dsdpo.data.packing import MicroBatch
from dsdpo.model.packed import ModelOutput, PackedInputs
from dsdpo.objectives.base import Objective
from dsdpo.objectives.supervised import SupervisedObjective
from dsdpo.reference.source import Reference
from dsdpo.runtime.progress import Progress
from dsdpo.train.metrics import MetricSums


def evaluate(
    engine: DeepSpeedEngine,
    loader: BatchLoader,
    reference: Reference,
    objective: Objective,
    batch_size: int,
    device: torch.device,
    goes_on: Callable[[], bool],
    per_example: dict[int, list[float]] | None = None,
) -> dict[str, float] | None:
    """Means over all examples of the loader's set, each counted once, the same on all ranks and for every world size.

    Args:
        batch_size: examples that all ranks together take at a time.
        goes_on: asked before each batch, and true or false on all ranks alike.
        per_example: gets the metrics of this rank's examples, by example id.

    Returns:
        None when it was left because `goes_on` said so.
    """

    def forward(micro_batch: MicroBatch) -> ModelOutput:
        return engine(PackedInputs.of(micro_batch, device))

    sums = MetricSums(objective.metrics, device)
    ids = np.arange(len(loader.source))
    left = False
    engine.eval()
    with torch.no_grad(), Progress("held-out", len(ids), "examples") as progress:
        for batch in loader.in_order(ids, batch_size, mean_over=loader.mean_over(ids)):
            if left := not goes_on():
                break
            loss_of = objective.bind(batch, reference.logps(batch), forward)
            for micro_batch in batch.to_compute(objective.first_alone):
                found = loss_of(micro_batch, forward(micro_batch))
                sums.add(found)
                if per_example is not None:
                    ids_here = batch.example_ids[micro_batch.examples].tolist()
                    per_example.update(zip(ids_here, found.metrics.T.tolist()))
            progress.advance(len(batch.example_ids))
    engine.train()
    if left:
        return None
    sums.reduce()
    means = sums.read().means
    if isinstance(objective, SupervisedObjective):  # its loss is a mean over tokens
        means["perplexity"] = math.exp(min(means["loss"], 700.0))
    return means
