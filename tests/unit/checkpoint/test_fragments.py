"""Whatever ranks wrote a parameter's pieces, any range of it is found again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsdpo.checkpoint.fragments import Fragments, index_of, join_indices, rank_file, tensors_of, write_tensors
from dsdpo.engine.zero_state import STATES, Piece
from dsdpo.errors import CheckpointError

SHAPES = {"a.weight": (3, 4), "b": (7,), "scalar": ()}


def whole(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {name: {s: torch.randn(shape, generator=generator) for s in STATES} for name, shape in SHAPES.items()}


def write(folder: Path, state: dict[str, dict[str, torch.Tensor]], cuts: list[float]) -> Fragments:
    """Each parameter cut at the same shares of its length, a rank for each part."""
    bounds = [0.0, *sorted(cuts), 1.0]
    parts = []
    for rank, (low, high) in enumerate(pairwise(bounds)):
        pieces = []
        for name, tensors in state.items():
            n = tensors["fp32"].numel()
            start, stop = round(low * n), round(high * n)
            if stop > start:
                views = {s: tensor.view(-1)[start:stop] for s, tensor in tensors.items()}
                pieces.append(Piece(name, SHAPES[name], start, views))
        if pieces:
            write_tensors(folder / rank_file(rank, len(bounds) - 1), tensors_of(pieces))
        parts.append(index_of(pieces, rank))
    return Fragments(folder, join_indices(parts), len(bounds) - 1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.floats(0, 1), max_size=4), low=st.floats(0, 1), high=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_range_of_any_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[float], low: float, high: float, seed: int
) -> None:
    state = whole(seed)
    with write(tmp_path_factory.mktemp("f"), state, cuts) as fragments:
        for name, tensors in state.items():
            n = tensors["fp32"].numel()
            start, stop = sorted((round(low * n), round(high * n)))
            for key, tensor in tensors.items():
                found = torch.full((stop - start,), torch.nan)
                fragments.read_into(found, name, key, start)
                assert torch.equal(found, tensor.view(-1)[start:stop])
                assert torch.equal(fragments.read(name, key), tensor)


def test_a_file_is_ordinary_safetensors(tmp_path: Path) -> None:
    state = whole(0)
    write(tmp_path, state, [])
    found = safetensors.torch.load_file(tmp_path / rank_file(0, 1))
    assert torch.equal(found["exp_avg/b"], state["b"]["exp_avg"])


def test_a_filled_piece_is_what_was_saved(tmp_path: Path) -> None:
    state = whole(1)
    target = {s: torch.zeros(5) for s in STATES}
    with write(tmp_path, state, [0.4]) as fragments:
        fragments.check({name: list(shape) for name, shape in SHAPES.items()})
        fragments.fill([Piece("b", (7,), 1, target)])
    assert all(torch.equal(target[s], state["b"][s][1:6]) for s in STATES)


@pytest.mark.parametrize(
    "shapes",
    [{"b": [7]}, {**{n: list(s) for n, s in SHAPES.items()}, "c": [1]}, {"a.weight": [4, 3], "b": [7], "scalar": []}],
)
def test_another_model_is_refused(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    with (
        write(tmp_path, whole(2), []) as fragments,
        pytest.raises(CheckpointError, match="trainable parameters differ"),
    ):
        fragments.check(shapes)


def test_a_gap_or_an_overlap_is_refused() -> None:
    def entry(*pieces: list[int]) -> dict[str, object]:
        return {"w": {"shape": [6], "pieces": list(pieces)}}

    join_indices([entry([0, 0, 4]), entry([1, 4, 2])])
    for parts in ([[0, 0, 4]], [[0, 0, 3], [1, 4, 2]], [[0, 0, 4], [1, 3, 3]]):
        with pytest.raises(CheckpointError, match="pieces of w"):
            join_indices([entry(part) for part in parts])
