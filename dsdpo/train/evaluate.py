"""Loss, reward accuracy and margin on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from dsdpo.data.loader import PairLoader
from dsdpo.model.packed import RowTensors
from dsdpo.objectives.batch import step_objective
from dsdpo.objectives.preference import PreferenceObjective
from dsdpo.reference.source import Reference
from dsdpo.train.metrics import StepVector


def evaluate(
    engine: DeepSpeedEngine,
    loader: PairLoader,
    reference: Reference,
    objective: PreferenceObjective,
    batch_size: int,
    device: torch.device,
    goes_on: Callable[[], bool],
) -> dict[str, float] | None:
    """Means over all pairs of the loader's set, each counted once, the same on all ranks and for every world size.

    Args:
        batch_size: pairs that all ranks together take at a time.
        goes_on: asked before each batch, and true or false on all ranks alike.

    Returns:
        None when it was left because `goes_on` said so.
    """
    vector = StepVector(device)
    mean_chosen_tokens = float(loader.pairs.lengths(np.arange(len(loader.pairs)))[:, 1].mean())
    left = False
    engine.eval()
    with torch.no_grad():
        for batch in loader.in_order(np.arange(len(loader.pairs)), batch_size):
            if left := not goes_on():
                break
            references = reference.of_step(batch)
            losses_of = step_objective(engine, objective, batch, references, device, mean_chosen_tokens)
            for row, row_reference in zip(batch.rows, references):
                outputs = engine(RowTensors.from_row(row, device))[: 2 * len(row.pairs)]
                _, losses, stats = losses_of(row, outputs, row_reference)
                vector.add(stats, losses)
    engine.train()
    if left:
        return None
    vector.reduce()
    return vector.read().means
