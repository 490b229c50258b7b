"""The objective over the rows of one optimizer step, also where a loss compares pairs that lie in different rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from deepspeed import DeepSpeedEngine, comm

from dsdpo.data.loader import Batch
from dsdpo.data.packing import Row
from dsdpo.model.packed import RowTensors
from dsdpo.objectives.pair_logps import PairFacts
from dsdpo.objectives.preference import PreferenceObjective


class RowLosses(NamedTuple):
    """Of one row's P pairs.

    Attributes:
        total: scalar with gradient; what the row adds to the sum of the step's losses.
        losses: fp32 [P], without gradient.
        stats: fp32 [len(STATS), P], without gradient.
    """

    total: torch.Tensor
    losses: torch.Tensor
    stats: torch.Tensor


def facts_of(batch: Batch, pairs: np.ndarray, mean_chosen_tokens: float | None, device: torch.device) -> PairFacts:
    """Facts of some pairs of a step.

    Args:
        batch: the step.
        pairs: int64 [P], indices into its pairs.
        mean_chosen_tokens: when another mean than the step's is wanted.
        device: where the losses are computed.
    """
    tokens = torch.from_numpy(batch.lengths[pairs, 1:].astype(np.float32))
    gaps = torch.from_numpy(batch.score_gaps[pairs].astype(np.float32))
    mean = batch.mean_chosen_tokens if mean_chosen_tokens is None else mean_chosen_tokens
    return PairFacts(tokens.to(device, non_blocking=True), gaps.to(device, non_blocking=True), mean)


@dataclass(frozen=True)
class EachRow:
    """For losses that see one pair at a time: a row's losses are its pairs' alone."""

    objective: PreferenceObjective
    batch: Batch
    mean_chosen_tokens: float | None

    def __call__(self, row: Row, outputs: torch.Tensor, reference: torch.Tensor | None) -> RowLosses:
        """outputs fp32 [2P, K] of the policy; reference fp32 [2P, 2] or None: see `PreferenceObjective`."""
        facts = facts_of(self.batch, row.pairs, self.mean_chosen_tokens, outputs.device)
        losses, stats = self.objective(outputs, reference, facts)
        return RowLosses(losses.sum(), losses.detach(), stats)


@dataclass(frozen=True)
class WholeStep:
    """For losses across pairs: what a pass without gradients has found out about the whole step.

    Attributes:
        gradients: fp32 [B, 2, K], of the sum of losses by the policy's outputs.
        losses: fp32 [B].
        stats: fp32 [len(STATS), B].
    """

    gradients: torch.Tensor
    losses: torch.Tensor
    stats: torch.Tensor

    @classmethod
    def first_pass(
        cls,
        engine: DeepSpeedEngine,
        objective: PreferenceObjective,
        batch: Batch,
        references: Sequence[torch.Tensor | None],
        mean_chosen_tokens: float | None,
        device: torch.device,
    ) -> WholeStep:
        """Run the policy over this rank's rows, gather the step's log-probs on all ranks, and differentiate there."""
        n = len(batch.pair_ids)
        outputs: torch.Tensor | None = None
        reference = torch.zeros(n, 2, 2, device=device)
        for row, row_reference in zip(batch.rows, references):
            with torch.no_grad():
                found = engine(RowTensors.from_row(row, device))
            if outputs is None:
                outputs = torch.zeros(n, 2, found.shape[1], device=device)
            if len(row.pairs):
                at = torch.from_numpy(row.pairs).to(device)
                outputs[at] = found.view(-1, 2, found.shape[1])
                if row_reference is not None:
                    reference[at] = row_reference.view(-1, 2, 2)
        assert outputs is not None, "a batch has at least one row"
        comm.all_reduce(outputs)
        comm.all_reduce(reference)
        facts = facts_of(batch, np.arange(n), mean_chosen_tokens, device)
        with torch.enable_grad():
            outputs.requires_grad_()
            known = None if references[0] is None else reference.flatten(0, 1)
            losses, stats = objective(outputs.flatten(0, 1), known, facts)
            (gradients,) = torch.autograd.grad(losses.sum(), outputs)
        return cls(gradients, losses.detach(), stats)

    def __call__(self, row: Row, outputs: torch.Tensor, reference: torch.Tensor | None) -> RowLosses:
        """The second pass: a number whose gradient by `outputs` is the known one. See `EachRow`."""
        at = torch.from_numpy(row.pairs).to(outputs.device)
        total = (outputs * self.gradients[at].flatten(0, 1)).sum()
        return RowLosses(total, self.losses[at], self.stats[:, at])


def step_objective(
    engine: DeepSpeedEngine,
    objective: PreferenceObjective,
    batch: Batch,
    references: Sequence[torch.Tensor | None],
    device: torch.device,
    mean_chosen_tokens: float | None = None,
) -> EachRow | WholeStep:
    """What turns the policy's outputs for a row of `batch` into losses.

    Args:
        engine: the policy; used only for losses across pairs, on all ranks alike.
        objective: of the run.
        batch: the step.
        references: for each row, fp32 [2P, 2] or None.
        device: of the engine.
        mean_chosen_tokens: see `facts_of`.
    """
    if objective.spans_batch:
        return WholeStep.first_pass(engine, objective, batch, references, mean_chosen_tokens, device)
    return EachRow(objective, batch, mean_chosen_tokens)
