"""The objective of stage dpo over ranked answers: 2 to 16 to a prompt, as many as each example has, with ties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch
from dsdpo.data.packing import MicroBatch
from dsdpo.errors import DataError
from dsdpo.model.packed import ModelOutput
from dsdpo.objectives.base import Forward, LossFunction, MicroBatchLoss
from dsdpo.objectives.sums import completion_sums


@dataclass(frozen=True)
class Ranks:
    """Which answer is better than which, of E examples with at most K answers each.

    Attributes:
        places: int64 [E, K], where each answer stands among the micro-batch's S completions; 0 where there is none.
        levels: int64 [E, K], 0 of the best; the same for answers that tie, -1 where there is none.
    """

    places: np.ndarray
    levels: np.ndarray

    @classmethod
    def of(cls, batch: Batch, micro_batch: MicroBatch) -> Ranks:
        """Of a micro-batch: by the order of the answers, of which those with the same score tie.

        The answers of a pair never tie: their record says which is better, whatever the scores.
        """
        counts = batch.lengths.counts[micro_batch.examples]
        widest = int(counts.max(initial=1))
        starts = np.cumsum(counts) - counts
        number = np.arange(widest)
        there = number < counts[:, None]
        scores = np.full(there.shape, np.nan)
        firsts = batch.lengths.starts[micro_batch.examples]
        for row, (first, count) in enumerate(zip(firsts, counts)):
            scores[row, :count] = batch.scores[first : first + count]
        falls = ~(scores[:, 1:] == scores[:, :-1]) | (counts[:, None] == 2)
        levels = np.concatenate([np.zeros((len(counts), 1), dtype=np.int64), np.cumsum(falls, axis=1)], axis=1)
        return cls(np.where(there, starts[:, None] + number, 0), np.where(there, levels, -1))


def plackett_luce(rewards: torch.Tensor, worse: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """-sum_i log(exp r_i / (exp r_i + sum of exp r_j over the j that are worse)): appendix A.3 of Rafailov et al.
    (arXiv 2305.18290). Answers that tie do not compete with each other.

    Args:
        rewards: fp32 [E, K].
        worse: bool [E, K, K], whether answer j (last) is worse than i.
        levels: int64 [E, K], see `Ranks`.

    Returns:
        fp32 [E].
    """
    k = rewards.shape[1]
    competes = worse | torch.eye(k, dtype=torch.bool, device=rewards.device)
    spread = rewards[:, None, :].expand(-1, k, -1).masked_fill(~competes, -torch.inf)
    return (spread.logsumexp(2) - rewards).masked_fill(levels < 0, 0.0).sum(1)


def _mean_over(losses: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """losses: fp32 [E, K, K]; the mean of those of some pairs of answers, fp32 [E]."""
    return losses.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2))


def all_pairs(rewards: torch.Tensor, worse: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(r_i - r_j) over all i, j with j worse than i. Arguments as of plackett_luce."""
    return _mean_over(-F.logsigmoid(rewards[:, :, None] - rewards[:, None, :]), worse)


def best_worst(rewards: torch.Tensor, worse: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The same over the best i and the worst j. Arguments as of plackett_luce."""
    extremes = (levels == 0)[:, :, None] & (levels == levels.max(1, keepdim=True).values)[:, None, :]
    return _mean_over(-F.logsigmoid(rewards[:, :, None] - rewards[:, None, :]), worse & extremes)


RANKING_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "plackett_luce": plackett_luce,
    "all_pairs": all_pairs,
    "best_worst": best_worst,
}


class RankingObjective:
    """A loss of the ranked answers of each example, on rewards beta log(pi(y|x) / pi_ref(y|x)).

    Attributes:
        head, needs_reference, metrics: see `Objective`. The chosen answer is the best, the rejected one the last;
            accuracy is the share of pairs of answers in the right order.
    """

    head: Literal["logprob"] = "logprob"
    first_alone = False
    needs_reference = True
    metrics = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

    def __init__(self, config: RunConfig) -> None:
        [(name, self._factor)] = config.weighted_losses.items()
        self._loss = RANKING_LOSSES[name]
        self._beta = config.beta

    def denominator(self, batch: Batch) -> float:
        """The sum of the examples' weights."""
        return float(batch.weights.sum())

    def bind(self, batch: Batch, reference: torch.Tensor | None, forward: Forward) -> LossFunction:
        """See `Objective`. Raises DataError where an example has one completion alone."""
        assert reference is not None, "rankings are compared with the reference"
        if (batch.lengths.counts < 2).any():
            where = int(batch.example_ids[batch.lengths.counts < 2][0])
            raise DataError(f"example {where} has one completion, and a ranking takes at least two; choose another set")

        def loss_of(micro_batch: MicroBatch, output: ModelOutput) -> MicroBatchLoss:
            """The loss of a micro-batch; of one without examples, 0 with a gradient path."""
            sums = completion_sums(output, micro_batch.completions).sum(1)
            at = torch.from_numpy(batch.completion_indices(micro_batch)).to(sums.device, non_blocking=True)
            ranks = Ranks.of(batch, micro_batch)
            places, levels = (
                torch.from_numpy(x).to(sums.device, non_blocking=True) for x in (ranks.places, ranks.levels)
            )
            if not len(places):
                return MicroBatchLoss(sums.sum(), sums.detach(), sums.new_zeros(len(self.metrics), 0))
            rewards = (self._beta * (sums - reference[at].sum(1)))[places]
            worse = (levels[:, :, None] < levels[:, None, :]) & (levels >= 0)[:, :, None]
            weights = torch.from_numpy(batch.weights[micro_batch.examples].astype(np.float32)).to(sums.device)
            losses = self._factor * self._loss(rewards, worse, levels) * weights
            last = (levels >= 0).sum(1, keepdim=True) - 1
            best, worst = rewards[:, 0], rewards.gather(1, last)[:, 0]
            right = _mean_over((rewards[:, :, None] > rewards[:, None, :]).float(), worse)
            metrics = torch.stack([losses / batch.mean_over.mean_weight, best, worst, right, best - worst]).detach()
            return MicroBatchLoss(losses.sum(), losses.detach(), metrics)

        return loss_of
