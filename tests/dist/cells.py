"""A sample of settings in which every two values of two factors occur together."""

from __future__ import annotations

import itertools
import random
from typing import Any, TypeAlias

Cell: TypeAlias = tuple[Any, ...]

FACTORS: dict[str, tuple[Any, ...]] = {
    "objective": ("pt", "sft", "dpo", "ranking", "kto", "rm"),
    "world": (1, 2, 3),
    "zero": (0, 1, 2, 3),
    "finetuning_type": ("full", "lora"),
    "share_prefix": (True, False),
    "masks": (True, False),
    "weights": (True, False),
    "quantization_bit": (None, 4, 8),
}
# What decides the numbers that a cell must give; the other factors must change nothing.
DECIDES = ("objective", "finetuning_type", "masks", "weights", "quantization_bit")
UNMASKED = ("ranking", "rm")  # examples_for makes none for them


def is_possible(cell: Cell) -> bool:
    """Whether such a run exists."""
    values = dict(zip(FACTORS, cell))
    if values["masks"] and values["objective"] in UNMASKED:
        return False
    bits = values["quantization_bit"]
    return bits is None or (values["finetuning_type"] == "lora" and (bits, values["zero"]) != (8, 3))


def sample(size: int = 40, seed: int = 0) -> list[Cell]:
    """Cells, values in the order of FACTORS, in which every possible pair of values occurs; each cell once.

    The cell that has most of the missing pairs comes next; once none is missing, cells are drawn at random.
    """
    rng = random.Random(seed)
    cells = [cell for cell in itertools.product(*FACTORS.values()) if is_possible(cell)]
    rng.shuffle(cells)
    missing = set().union(*map(_pairs, cells))
    found: list[Cell] = []
    while missing or len(found) < size:
        best = max(cells, key=lambda cell: len(_pairs(cell) & missing))
        missing -= _pairs(best)
        found.append(best)
        cells.remove(best)
    return found


def _pairs(cell: Cell) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(zip(FACTORS, cell), 2))


def yardstick(cell: Cell) -> Cell:
    """The same numbers on one rank, at stage 0, each completion with a prompt of its own."""
    values = dict(zip(FACTORS, cell))
    return tuple({**values, "world": 1, "zero": 0, "share_prefix": False}.values())


def few(cells: list[Cell]) -> list[Cell]:
    """One cell for each objective, on several ranks."""
    parallel = [cell for cell in cells if dict(zip(FACTORS, cell))["world"] > 1 and yardstick(cell) != cell]
    return [next(cell for cell in parallel if cell[0] == objective) for objective in FACTORS["objective"]]
