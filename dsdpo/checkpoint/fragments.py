"""Pieces of parameters in safetensors files, found again by name and range, whatever wrote them.

Each rank writes one file with its pieces, keyed `state/parameter`; the index says for each parameter which file has
which run of its elements. A reader maps the files into memory and takes the ranges that it needs, so that any number
of ranks reads what any other number wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsdpo.checkpoint.commit import FileRecord, hashed_file
from dsdpo.engine.zero_state import STATES, Piece
from dsdpo.errors import CheckpointError

Index = dict[str, Any]
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


def rank_file(rank: int, world_size: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], portions: Iterable[dict[str, torch.Tensor]] = ()
) -> FileRecord:
    """A safetensors file of tensors.

    Args:
        tensors: what the file holds; those that are not in memory stand on the device `meta`.
        portions: of which those come, in the same order, one portion after another.

    Raises:
        IOFailure: the file system refused.
    """
    shapes = {key: (tensor.dtype, list(tensor.shape)) for key, tensor in tensors.items()}
    source, portion = iter(portions), dict[str, torch.Tensor]()

    def tensor_of(key: str) -> torch.Tensor:
        nonlocal portion
        if not tensors[key].is_meta:
            return tensors[key]
        while key not in portion:
            portion = next(source)
        return portion[key]

    return write_stream(path, shapes, tensor_of)


def write_stream(
    path: Path, shapes: dict[str, tuple[torch.dtype, list[int]]], tensor_of: Callable[[str], torch.Tensor]
) -> FileRecord:
    """A safetensors file, written tensor by tensor and hashed on the way.

    Args:
        shapes: key -> precision and shape.
        tensor_of: gives the tensor of a key; asked once for each, in order.

    Raises:
        IOFailure: the file system refused.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in shapes.items():
        start, end = end, end + _numel(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with hashed_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in shapes:
            data = tensor_of(key).detach().contiguous().cpu().view(-1).view(torch.uint8)
            file.write(data.numpy().data)
    return file.record


def tensors_of(pieces: Iterable[Piece]) -> dict[str, torch.Tensor]:
    """What a rank's file holds for its pieces."""
    return {f"{state}/{piece.name}": piece.states[state] for piece in pieces for state in STATES}


def index_of(pieces: Iterable[Piece], rank: int) -> Index:
    """A rank's part of the index: parameter -> its shape, and (rank, start, length) of each piece."""
    return {piece.name: {"shape": list(piece.shape), "pieces": [[rank, piece.start, len(piece)]]} for piece in pieces}


def join_indices(parts: Iterable[Index]) -> Index:
    """The index of all ranks.

    Raises:
        CheckpointError: the pieces of a parameter leave a gap or overlap.
    """
    whole: Index = {}
    for part in parts:
        for name, entry in part.items():
            whole.setdefault(name, {"shape": entry["shape"], "pieces": []})["pieces"] += entry["pieces"]
    for name, entry in whole.items():
        entry["pieces"].sort(key=lambda piece: piece[1])
        end = 0
        for _, start, length in entry["pieces"]:
            if start != end:
                raise CheckpointError(f"the pieces of {name} do not join at element {end}: {entry['pieces']}")
            end += length
        if end != _numel(entry["shape"]):
            raise CheckpointError(f"the pieces of {name} end at element {end}, its shape is {entry['shape']}")
    return whole


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class Fragments:
    """The parameters of a checkpoint. A context manager that closes its files.

    Args:
        folder: of the checkpoint.
        index: of `join_indices`.
        world_size: how many ranks wrote it.
    """

    def __init__(self, folder: Path, index: Index, world_size: int) -> None:
        self.folder = folder
        self.index = index
        self._world_size = world_size
        self._files: dict[int, Any] = {}

    def __enter__(self) -> Fragments:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            path = self.folder / rank_file(rank, self._world_size)
            try:
                self._files[rank] = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return self._files[rank]

    def read_into(self, target: torch.Tensor, name: str, state: str, start: int) -> None:
        """Copy elements `start` … of a parameter's state into a 1-D tensor.

        Raises:
            CheckpointError: a file cannot be read.
        """
        stop = start + target.numel()
        for rank, first, length in self.index[name]["pieces"]:
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                stored = self._file(rank).get_slice(f"{state}/{name}")[low - first : high - first]
                target[low - start : high - start].copy_(stored)

    def read(self, name: str, state: str) -> torch.Tensor:
        """A whole state of a parameter, fp32, in its shape. Raises CheckpointError."""
        shape = self.index[name]["shape"]
        whole = torch.empty(_numel(shape), dtype=torch.float32)
        self.read_into(whole, name, state, 0)
        return whole.view(shape)

    def check(self, shapes: dict[str, list[int]]) -> None:
        """Compare with the trainable parameters of a model.

        Raises:
            CheckpointError: the model has others, or in other shapes.
        """
        saved = {name: entry["shape"] for name, entry in self.index.items()}
        wrong = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
        if wrong:
            first = wrong[0]
            raise CheckpointError(
                f"{self.folder} does not fit the model: {len(wrong)} trainable parameters differ, such as {first}: "
                f"{saved.get(first, 'nothing')} in the checkpoint, {shapes.get(first, 'nothing')} in the model"
            )

    def fill(self, pieces: list[Piece]) -> None:
        """Put the saved state into the pieces that a rank holds. Raises CheckpointError."""
        for piece in pieces:
            for state, tensor in piece.states.items():
                self.read_into(tensor, piece.name, state, piece.start)
