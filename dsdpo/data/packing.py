"""The examples of one optimizer step, laid out in micro-batches: pure functions of lengths and token ids.

A micro-batch is one sequence of tokens that the model computes at once. With a shared prefix it holds, example after
example,

    [prompt_1 | completion_1.0 | completion_1.1 | … | prompt_2 | completion_2.0 | …]
    positions: prompt 0 … p-1, each completion p … p+n-1

where each completion attends to its prompt and to itself. Without one it holds whole sequences:

    [prompt_1 completion_1.0 | prompt_1 completion_1.1 | …]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dsdpo.data.example import TokenizedExample
from dsdpo.data.order import mix
from dsdpo.errors import DataError

# micro_batches[micro_step][rank] -> indices into the step's examples; empty where a rank has nothing to do
StepPlan = list[list[list[int]]]


class Segment(NamedTuple):
    """Tokens start … start+length-1 of a micro-batch; they attend causally to themselves and to all of the prefix."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class Noise(NamedTuple):
    """What the noise on a micro-batch's embeddings is made of: `dsdpo.model.noise`.

    Attributes:
        keys: int64 [T], the same for the same token of the same example in the same step, however it is packed.
        scales: fp32 [T].
    """

    keys: np.ndarray
    scales: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """What one data-parallel rank computes at once: T tokens, C of them scored, in S completions of E examples.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T].
        segments: in order, together covering all T tokens.
        loss_positions: int64 [C], positions whose hidden state predicts a scored token.
        target_ids: int64 [C], the tokens predicted.
        completions: int64 [S, 3]: index of the example in the batch, number of the completion in it, scored tokens.
            The scored tokens add up to C, except in a micro-batch without examples, which has no completions.
        last_positions: int64 [S], position of the last token of each completion.
        noise: on its embeddings, or None.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: list[Segment]
    loss_positions: np.ndarray
    target_ids: np.ndarray
    completions: np.ndarray
    last_positions: np.ndarray
    noise: Noise | None = None

    @property
    def examples(self) -> np.ndarray:
        """int64 [E]: indices of its examples in the batch, in order."""
        return self.completions[self.completions[:, 1] == 0, 0]


def plan_step(tokens: np.ndarray, dp_size: int, max_tokens_per_row: int) -> StepPlan:
    """Deal a step's examples out to data-parallel ranks and micro-steps.

    Longest examples first, each to the micro-batch with the fewest tokens so far, over dp_size * m micro-batches with
    the smallest m for which none overflows. Micro-batches of like size then share a micro-step, since with ZeRO-3 every
    rank waits for the longest of each micro-step.

    Args:
        tokens: int [B], tokens of each example in a micro-batch.
        dp_size: number of data-parallel ranks.
        max_tokens_per_row: the longest micro-batch allowed.

    Returns:
        micro_batches[micro_step][rank], lists of indices into `tokens`; the same m for all ranks.

    Raises:
        DataError: a single example is longer than max_tokens_per_row.
    """
    longest = int(tokens.max(initial=0))
    if longest > max_tokens_per_row:
        raise DataError(
            f"an example takes {longest} tokens, max_tokens_per_row is {max_tokens_per_row}: raise it, lower "
            "max_length, or prepare the data again"
        )
    micro_steps = max(1, math.ceil(int(tokens.sum()) / (dp_size * max_tokens_per_row)))
    while (found := _fill(tokens, dp_size * micro_steps, max_tokens_per_row)) is None:
        micro_steps += 1
    found.sort(key=lambda indices: -int(tokens[indices].sum()))
    return [found[m * dp_size : (m + 1) * dp_size] for m in range(micro_steps)]


def _fill(tokens: np.ndarray, number: int, capacity: int) -> list[list[int]] | None:
    """Longest-first list scheduling into `number` micro-batches; None when the least full one cannot take the next."""
    found: list[list[int]] = [[] for _ in range(number)]
    load = np.zeros(number, dtype=np.int64)
    for index in np.argsort(-tokens, kind="stable"):
        least = int(load.argmin())
        if load[least] + tokens[index] > capacity:
            return None
        found[least].append(int(index))
        load[least] += tokens[index]
    return found


def idle_share(plan: StepPlan, tokens: np.ndarray) -> float:
    """Share of a step's time, counted in tokens, that ranks wait for the longest micro-batch of each micro-step.

    Args:
        plan: of `plan_step`.
        tokens: int [B], tokens of each example in a micro-batch.
    """
    loads = np.array([[int(tokens[indices].sum()) for indices in micro_step] for micro_step in plan])
    return float(1 - loads.sum() / (loads.max(axis=1).sum() * loads.shape[1]))


class _Layout:
    """A micro-batch under construction."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.loss_positions: list[np.ndarray] = []
        self.target_ids: list[np.ndarray] = []
        self.completions: list[tuple[int, int, int]] = []
        self.last_positions: list[int] = []
        self.length = 0

    def append(self, ids: np.ndarray, first_position: int, prefix: tuple[int, int] = (0, 0)) -> int:
        """Add a segment; returns where it starts. prefix: start and length."""
        start, n = self.length, len(ids)
        self.ids.append(ids)
        self.positions.append(np.arange(first_position, first_position + n))
        self.segments.append(Segment(start, n, *prefix))
        self.length += n
        return start

    def score(self, index: int, number: int, example: TokenizedExample, start: int, prompt_end: int) -> None:
        """Score completion `number`, whose tokens begin at `start`; `prompt_end` is the prompt's last position."""
        ids = example.completion_ids[number]
        scored = example.is_scored(number)
        predicted_from = np.concatenate([[prompt_end], np.arange(start, start + len(ids) - 1)])
        self.loss_positions.append(predicted_from[scored])
        self.target_ids.append(ids[scored])
        self.completions.append((index, number, int(scored.sum())))
        self.last_positions.append(start + len(ids) - 1)


def build_micro_batch(examples: Sequence[TokenizedExample], indices: Sequence[int], share_prefix: bool) -> MicroBatch:
    """Lay examples out one after another.

    Args:
        examples: of the micro-batch, at least one.
        indices: their places in the batch, kept in `MicroBatch.completions`.
        share_prefix: see the module's docstring.
    """
    layout = _Layout()
    for index, example in zip(indices, examples):
        prompt, p = example.prompt_ids, len(example.prompt_ids)
        shared = layout.append(prompt, 0) if share_prefix and p else 0
        for number, ids in enumerate(example.completion_ids):
            if share_prefix:
                start = layout.append(ids, p, (shared, p) if p else (0, 0))
                prompt_end = shared + p - 1
            else:
                start = layout.append(np.concatenate([prompt, ids]), 0) + p
                prompt_end = start - 1
            layout.score(index, number, example, start, prompt_end)
    return MicroBatch(
        input_ids=np.concatenate(layout.ids).astype(np.int64),
        position_ids=np.concatenate(layout.positions).astype(np.int64),
        segments=layout.segments,
        loss_positions=np.concatenate(layout.loss_positions).astype(np.int64),
        target_ids=np.concatenate(layout.target_ids).astype(np.int64),
        completions=np.array(layout.completions, dtype=np.int64).reshape(-1, 3),
        last_positions=np.array(layout.last_positions, dtype=np.int64),
    )


def only_completion(micro_batch: MicroBatch, number: int) -> MicroBatch:
    """A micro-batch with one completion of each example, which is number 0 in it.

    Args:
        micro_batch: whose examples have that completion all; one without examples stays as it is, without noise.
        number: of the completion.
    """
    wanted = micro_batch.completions[:, 1] == number
    if not len(wanted):
        return micro_batch
    starts = np.array([segment.start for segment in micro_batch.segments])
    own = np.searchsorted(starts, micro_batch.last_positions[wanted], side="right") - 1
    prefixes = [micro_batch.segments[i].prefix_start for i in own if micro_batch.segments[i].prefix_length]
    kept = [micro_batch.segments[i] for i in sorted({*own.tolist(), *np.searchsorted(starts, prefixes).tolist()})]
    tokens = np.concatenate([np.arange(segment.start, segment.start + segment.length) for segment in kept])
    place = np.zeros(len(micro_batch.input_ids), dtype=np.int64)
    place[tokens] = np.arange(len(tokens))
    scored = np.repeat(wanted, micro_batch.completions[:, 2])
    completions = micro_batch.completions[wanted]
    completions[:, 1] = 0
    return MicroBatch(
        input_ids=micro_batch.input_ids[tokens],
        position_ids=micro_batch.position_ids[tokens],
        segments=[
            segment._replace(start=int(place[segment.start]), prefix_start=int(place[segment.prefix_start]))
            for segment in kept
        ],
        loss_positions=place[micro_batch.loss_positions[scored]],
        target_ids=micro_batch.target_ids[scored],
        completions=completions,
        last_positions=place[micro_batch.last_positions[wanted]],
    )


def add_noise(
    micro_batch: MicroBatch, examples: Sequence[TokenizedExample], keys: np.ndarray, alpha: float, share_prefix: bool
) -> MicroBatch:
    """The micro-batch with noise on its embeddings.

    Args:
        examples, share_prefix: as it was built with.
        keys: uint64 [E], one for each example.
        alpha: of NEFTune.
    """
    found, scales = [], []
    for key, example in zip(keys, examples):
        p, sizes = len(example.prompt_ids), list(map(len, example.completion_ids))
        prompt = _token_keys(key, 0, np.arange(p))
        completions = [_token_keys(key, k + 1, np.arange(p, p + n)) for k, n in enumerate(sizes)]
        if share_prefix:
            own = [prompt, *completions]
        else:
            own = [part for completion in completions for part in (prompt, completion)]
        found += own
        scales.append(np.full(sum(map(len, own)), alpha / math.sqrt(p + max(sizes)), dtype=np.float32))
    noise = Noise(np.concatenate(found).astype(np.int64), np.concatenate(scales))
    return replace(micro_batch, noise=noise)


def _token_keys(key: np.uint64, number: int, positions: np.ndarray) -> np.ndarray:
    """uint64 keys of the tokens of a prompt (0) or completion (1 ...)."""
    return mix(positions.astype(np.uint64) + np.uint64(number << 32), int(key))


def empty_micro_batch() -> MicroBatch:
    """The smallest one, for a rank without examples: it must still take part in every ZeRO-3 gather.

    Two tokens, one of them scored, and no completion: what is computed belongs to nothing.
    """
    zero = np.zeros(1, dtype=np.int64)
    micro_batch = build_micro_batch([TokenizedExample(zero, (zero,))], [0], share_prefix=False)
    return MicroBatch(
        micro_batch.input_ids,
        micro_batch.position_ids,
        micro_batch.segments,
        micro_batch.loss_positions,
        micro_batch.target_ids,
        completions=np.zeros((0, 3), dtype=np.int64),
        last_positions=np.zeros(0, dtype=np.int64),
    )
