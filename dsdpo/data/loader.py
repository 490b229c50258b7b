"""The micro-batches of this rank for each optimizer step, streamed from the prepared shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dsdpo.data.example import Lengths, TokenizedExample
from dsdpo.data.order import Order, example_keys
from dsdpo.data.packing import (
    MicroBatch,
    add_noise,
    build_micro_batch,
    empty_micro_batch,
    idle_share,
    only_completion,
    plan_step,
)
from dsdpo.runtime.env import Mesh


class ExampleSource(Protocol):
    """What the loader reads: a prepared set, or anything with these methods of one. `ids` are int64 [B]."""

    @property
    def fingerprint(self) -> str:
        """Changes with the examples, their order or the split."""
        ...

    @property
    def earlier_fingerprints(self) -> dict[int, str]:
        """Version of the preparation -> what `fingerprint` was in it; without those that made other examples."""
        ...

    @property
    def template_date(self) -> str | None:
        """The day that the chat template writes as today's, or None."""
        ...

    @property
    def end_token(self) -> str | None:
        """The token that ends the completions, where it is known."""
        ...

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> list[int]:
        """Examples of each set that it was made from, whose ids stand one set after another."""
        ...

    def lengths(self, ids: np.ndarray) -> Lengths:
        """Of B examples."""
        ...

    def digests(self, ids: np.ndarray) -> np.ndarray:
        """DIGEST [B]: what stands for an example's token ids in the reference store."""
        ...

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """float64 [N], the data's rating of each completion, NaN where there is none."""
        ...

    def weights(self, ids: np.ndarray) -> np.ndarray:
        """float64 [B], the factor on each example's loss."""
        ...

    def example(self, index: int) -> TokenizedExample:
        """Token ids of one example."""
        ...

    def where(self, index: int) -> str:
        """The place that it comes from, such as `file.jsonl:17`."""
        ...


class Packing(NamedTuple):
    """How a step's examples were packed, over all data-parallel ranks.

    Attributes:
        logical_tokens: tokens with the prompt repeated for each completion, what padded training would count.
        physical_tokens: tokens in the micro-batches.
        idle_share: part of the step, in tokens, for which ranks wait for the longest micro-batch of a micro-step.
    """

    logical_tokens: int
    physical_tokens: int
    idle_share: float


class MeanOver(NamedTuple):
    """The examples over which means are taken: those of a step in training, of the whole set in an evaluation.

    Attributes:
        lengths: of M examples.
        weights: float64 [M].
        scores: float64, of all their completions.
    """

    lengths: Lengths
    weights: np.ndarray
    scores: np.ndarray

    @property
    def mean_weight(self) -> float:
        return float(self.weights.mean())

    @property
    def mean_first_loss_tokens(self) -> float:
        """Scored tokens of an example's first completion, averaged over the examples with their weights."""
        first = self.lengths.loss_tokens[self.lengths.starts]
        return float((self.weights * first).sum() / self.weights.sum())


@dataclass(frozen=True)
class Batch:
    """One optimizer step as this rank sees it: B examples with N completions over all ranks.

    Attributes:
        example_ids: int64 [B].
        lengths: of the B examples.
        scores: float64 [N], the data's rating of each completion; NaN where there is none.
        weights: float64 [B].
        micro_batches: of this rank, one for each micro-step; all ranks have the same number.
        packing: see there.
        mean_over: see there.
    """

    example_ids: np.ndarray
    lengths: Lengths
    scores: np.ndarray
    weights: np.ndarray
    micro_batches: list[MicroBatch]
    packing: Packing
    mean_over: MeanOver

    def to_compute(self, first_alone: bool) -> list[MicroBatch]:
        """This rank's micro-batches, whole or with the first completion of each example alone."""
        return [only_completion(some, 0) for some in self.micro_batches] if first_alone else self.micro_batches

    def completion_indices(self, micro_batch: MicroBatch) -> np.ndarray:
        """int64 [S]: places of a micro-batch's completions among the batch's N."""
        return self.lengths.starts[micro_batch.completions[:, 0]] + micro_batch.completions[:, 1]


class BatchLoader:
    """Batches as a pure function of the example ids, the number of data-parallel ranks and the packing settings.

    Args:
        source: the prepared set.
        mesh: this rank's place.
        max_tokens_per_row: longest micro-batch, in tokens.
        share_prefix: whether a prompt stands once in its micro-batch.
        noise_alpha: of the noise on the embeddings in training; 0: none.
    """

    def __init__(
        self,
        source: ExampleSource,
        mesh: Mesh,
        max_tokens_per_row: int,
        share_prefix: bool,
        noise_alpha: float = 0.0,
    ) -> None:
        self.noise_alpha = noise_alpha
        self.source = source
        self.mesh = mesh
        self.max_tokens_per_row = max_tokens_per_row
        self.share_prefix = share_prefix

    def batch(
        self, example_ids: np.ndarray, mean_over: MeanOver | None = None, keys: np.ndarray | None = None
    ) -> Batch:
        """This rank's micro-batches for one step's examples.

        Args:
            mean_over: see `Batch`; None: the step's.
            keys: uint64 [B], of the noise on the examples' embeddings; None: without noise.
        """
        lengths, weights = self.source.lengths(example_ids), self.source.weights(example_ids)
        scores = self.source.scores(example_ids)
        tokens = lengths.packed(self.share_prefix)
        plan = plan_step(tokens, self.mesh.dp_size, self.max_tokens_per_row)
        return Batch(
            example_ids=example_ids,
            lengths=lengths,
            scores=scores,
            weights=weights,
            micro_batches=[self._micro_batch(example_ids, step[self.mesh.dp_rank], keys) for step in plan],
            packing=Packing(lengths.padded, int(tokens.sum()), idle_share(plan, tokens)),
            mean_over=MeanOver(lengths, weights, scores) if mean_over is None else mean_over,
        )

    def _micro_batch(self, example_ids: np.ndarray, indices: list[int], keys: np.ndarray | None) -> MicroBatch:
        if not indices:
            return empty_micro_batch()
        examples = [self.source.example(int(example_ids[i])) for i in indices]
        found = build_micro_batch(examples, indices, self.share_prefix)
        if keys is None:
            return found
        return add_noise(found, examples, keys[indices], self.noise_alpha, self.share_prefix)

    def stream(
        self, steps: Iterable[tuple[np.ndarray, np.ndarray | None]], mean_over: MeanOver | None = None
    ) -> Iterator[Batch]:
        """Batches in order, each built on a thread while the one before it is in use. steps: ids and keys of each."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = None
            for example_ids, keys in steps:
                following = pool.submit(self.batch, example_ids, mean_over, keys)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def training_batches(
        self, steps: range, train_batch_size: int, seed: int, order: Order | None = None
    ) -> Iterator[Batch]:
        """The batches of optimizer steps `steps`: starting anywhere costs nothing. order: None: each example once."""
        taken = order or Order.of([len(self.source)])

        def of(step: int) -> tuple[np.ndarray, np.ndarray | None]:
            ids = taken.step_ids(step, train_batch_size, seed)
            return ids, example_keys(ids, seed, step) if self.noise_alpha else None

        return self.stream(map(of, steps))

    def mean_over(self, example_ids: np.ndarray) -> MeanOver:
        """Of some of the set's examples."""
        source = self.source
        return MeanOver(source.lengths(example_ids), source.weights(example_ids), source.scores(example_ids))

    def in_order(self, example_ids: np.ndarray, batch_size: int, mean_over: MeanOver | None = None) -> Iterator[Batch]:
        """Each of `example_ids` once, in order: for evaluation and for the reference pass."""
        starts = range(0, len(example_ids), batch_size)
        return self.stream(((example_ids[start : start + batch_size], None) for start in starts), mean_over)
