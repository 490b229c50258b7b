"""Examples for each stage: with masks, weights, labels and scores."""

from __future__ import annotations

import numpy as np

from tests.helpers.tiny import ListOfExamples, random_examples

_COUNTS = {"pt": (1,), "sft": (1, 3), "kto": (2,), "dpo": (2,), "ranking": (4, 2, 3), "rm": (2,)}


def examples_for(stage: str, n: int, seed: int = 0, masks: bool = True, weights: bool = True) -> ListOfExamples:
    """Random examples for a stage, or `ranking`: 2 to 4 answers for `dpo`, with ties.

    Args:
        masks: whether some have a loss mask; of `pt` and `sft`, some have an empty prompt then, too.
        weights: whether their weights differ.
    """
    rng = np.random.default_rng(seed)
    factors = rng.choice([0.5, 1.0, 2.0], size=n) if weights else np.ones(n)
    can_mask = masks and stage not in ("rm", "ranking")
    examples = random_examples(n, _COUNTS[stage], seed, masks=can_mask, empty=can_mask and stage in ("pt", "sft"))
    scores = None
    if stage == "rm":
        scores = rng.normal(size=2 * n)
    elif stage == "kto":
        scores = np.stack([np.arange(n) % 3 != 0, np.full(n, np.nan)], axis=1).ravel().astype(np.float64)
    elif stage == "ranking":
        ranked = [{4: (3.0, 2.0, 2.0, 0.0), 3: (np.nan,) * 3, 2: (1.0, 1.0)}[len(e.completion_ids)] for e in examples]
        scores = np.concatenate(ranked)
    return ListOfExamples(examples, scores, factors)
