"""The pairs of one optimizer step, laid out in rows: pure functions of lengths and token ids.

A row is one sequence of tokens that the model computes at once. With a shared prefix it holds, pair after pair,

    [prompt_1 | chosen_1 | rejected_1 | prompt_2 | chosen_2 | rejected_2 | …]
    positions: prompt 0 … p-1, chosen p … p+c-1, rejected p … p+r-1

where each completion attends to its prompt and to itself. Without one it holds whole sequences:

    [prompt_1 chosen_1 | prompt_1 rejected_1 | …]

Completion 2k of a row is the chosen side of its k-th pair, completion 2k+1 the rejected side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsdpo.errors import DataError

# rows[micro_step][rank] -> indices into the step's list of pairs; empty where a rank has nothing to do
StepPlan = list[list[list[int]]]


class TokenPair(NamedTuple):
    """One preference pair as token ids: int64 arrays of p, c and r tokens, the completions with their EOS."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray


class Segment(NamedTuple):
    """Tokens start … start+length-1 of a row; they attend causally to themselves and to all of the prefix."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Row:
    """One packed row.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T].
        segments: in row order, together covering all T tokens.
        score_from: int64 [C], positions whose hidden state predicts a completion token.
        targets: int64 [C], the tokens predicted.
        part_lengths: int64 [n, 2], scored tokens of each completion, in order: those at places that the pair's other
            completion has too, and those beyond its end. They add up to C.
        pairs: int64 [P], indices of the row's pairs in the step; empty for a dummy row.
        logical_tokens: tokens that plain padded training would have computed: 2p + c + r summed over pairs.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: list[Segment]
    score_from: np.ndarray
    targets: np.ndarray
    part_lengths: np.ndarray
    pairs: np.ndarray
    logical_tokens: int


def row_lengths(lengths: np.ndarray, share_prefix: bool) -> np.ndarray:
    """Tokens that each pair takes in a row.

    Args:
        lengths: int [N, 3], tokens of prompt, chosen and rejected.
        share_prefix: whether the prompt stands once or twice.

    Returns:
        int64 [N]: p+c+r, or 2p+c+r.
    """
    weights = np.array([1 if share_prefix else 2, 1, 1], dtype=np.int64)
    return np.asarray(lengths, dtype=np.int64) @ weights


def plan_step(tokens: np.ndarray, dp_size: int, max_tokens_per_row: int) -> StepPlan:
    """Deal a step's pairs out to ranks and micro-steps.

    Longest pairs first, each to the row with the fewest tokens so far, over dp_size * m rows with the smallest
    m for which no row overflows. Rows of like size then share a micro-step, since with ZeRO-3 every rank waits for
    the longest row of each micro-step.

    Args:
        tokens: int [B], row tokens of each pair.
        dp_size: number of data-parallel ranks.
        max_tokens_per_row: the longest row allowed.

    Returns:
        rows[micro_step][dp_rank], lists of indices into `tokens`; the same m for all ranks.

    Raises:
        DataError: a single pair is longer than max_tokens_per_row.
    """
    longest = int(tokens.max(initial=0))
    if longest > max_tokens_per_row:
        raise DataError(
            f"a pair takes {longest} tokens in a row, max_tokens_per_row is {max_tokens_per_row}: raise it, "
            "lower max_length, or prepare the data again"
        )
    micro_steps = max(1, math.ceil(int(tokens.sum()) / (dp_size * max_tokens_per_row)))
    while (rows := _fill(tokens, dp_size * micro_steps, max_tokens_per_row)) is None:
        micro_steps += 1
    rows.sort(key=lambda row: -int(tokens[row].sum()))
    return [rows[m * dp_size : (m + 1) * dp_size] for m in range(micro_steps)]


def _fill(tokens: np.ndarray, n_rows: int, capacity: int) -> list[list[int]] | None:
    """Longest-first list scheduling into n_rows rows; None when the least full row cannot take the next pair."""
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    load = np.zeros(n_rows, dtype=np.int64)
    for index in np.argsort(-tokens, kind="stable"):
        row = int(load.argmin())
        if load[row] + tokens[index] > capacity:
            return None
        rows[row].append(int(index))
        load[row] += tokens[index]
    return rows


def idle_share(plan: StepPlan, tokens: np.ndarray) -> float:
    """Share of a step's time, counted in tokens, that ranks wait for the longest row of each micro-step.

    Args:
        plan: of `plan_step`.
        tokens: int [B], row tokens of each pair.
    """
    loads = np.array([[int(tokens[row].sum()) for row in micro_step] for micro_step in plan])
    return float(1 - loads.sum() / (loads.max(axis=1).sum() * loads.shape[1]))


def build_row(pairs: Sequence[TokenPair], indices: Sequence[int], share_prefix: bool) -> Row:
    """Lay pairs out one after another in a row.

    Args:
        pairs: token ids of the row's pairs.
        indices: their places in the step, kept in `Row.pairs`.
        share_prefix: see the module's docstring.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    score_from: list[np.ndarray] = []
    part_lengths: list[tuple[int, int]] = []
    start = 0
    for prompt, chosen, rejected in pairs:
        p = len(prompt)
        shared = min(len(chosen), len(rejected))
        prompt_start = start
        if share_prefix:
            ids.append(prompt)
            positions.append(np.arange(p))
            segments.append(Segment(start, p))
            start += p
        for answer in (chosen, rejected):
            n = len(answer)
            if share_prefix:
                ids.append(answer)
                positions.append(np.arange(p, p + n))
                segments.append(Segment(start, n, prompt_start, p))
                score_from.append(np.concatenate([[prompt_start + p - 1], np.arange(start, start + n - 1)]))
                start += n
            else:
                ids.extend((prompt, answer))
                positions.append(np.arange(p + n))
                segments.append(Segment(start, p + n))
                score_from.append(np.arange(start + p - 1, start + p + n - 1))
                start += p + n
            part_lengths.append((shared, n - shared))
    return Row(
        input_ids=np.concatenate(ids).astype(np.int64),
        position_ids=np.concatenate(positions).astype(np.int64),
        segments=segments,
        score_from=np.concatenate(score_from).astype(np.int64),
        targets=np.concatenate([answer for _, *answers in pairs for answer in answers]).astype(np.int64),
        part_lengths=np.array(part_lengths, dtype=np.int64),
        pairs=np.asarray(indices, dtype=np.int64),
        logical_tokens=sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs) if len(indices) else 0,
    )


def dummy_row(share_prefix: bool) -> Row:
    """The smallest row, for a rank without pairs: it must still take part in every ZeRO-3 gather."""
    token = np.zeros(1, dtype=np.int64)
    return build_row([TokenPair(token, token, token)], [], share_prefix)
