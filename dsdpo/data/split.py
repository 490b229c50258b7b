"""Which examples val_size holds out: whole groups of equal prompts, so that no held-out question is trained on.

    <set>/prompt_keys.npy            uint64 [examples]: equal for equal prompts
    <set>/splits/<N>-<seed>/eval.npy shard rows of the held-out examples, about N of them, and train.npy of the others

The choice follows from the prompts, N and the seed alone, and both files are memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dsdpo.data.example import Message
from dsdpo.data.order import keyed_hash
from dsdpo.errors import DataError
from dsdpo.runtime.files import fsync_tree

PROMPT_KEYS = "prompt_keys.npy"
_SPLITS = "splits"
_PARTS = ("eval", "train")


def prompt_key(prompt: str | list[Message]) -> int:
    """64 bits that stand for a prompt: its roles and texts. A single user message has the key of its text."""
    if not isinstance(prompt, str):
        said = [[message["role"], str(message.get("content") or "").strip()] for message in prompt]
        prompt = said[0][1] if len(said) == 1 else json.dumps(said)
    digest = hashlib.blake2b(prompt.strip().encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_folder(path: Path, held_out: int, seed: int) -> Path:
    """Where the index of a split lies that asks for `held_out` examples."""
    return path / _SPLITS / f"{held_out}-{seed}"


def is_split(folder: Path) -> bool:
    """Whether the index has been written."""
    return all((folder / f"{part}.npy").exists() for part in _PARTS)


def load_rows(folder: Path, part: str) -> np.ndarray:
    """Shard rows of `eval` or `train`, memory-mapped."""
    found: np.ndarray = np.load(folder / f"{part}.npy", mmap_mode="r")
    return found


def write_split(folder: Path, keys: Iterable[np.ndarray], held_out: int, seed: int) -> None:
    """Write the index of a split; another process may do so at the same time.

    Args:
        folder: from `split_folder`.
        keys: of all examples' prompts, uint64, in parts.
        held_out: examples that val_size asks for, at least 1.
        seed: of the run.

    Raises:
        DataError: all examples have one prompt.
        OSError: the file system refused a write.
    """
    hashed = keyed_hash(np.concatenate(list(keys)), seed)
    is_held = np.isin(hashed, held_out_groups(hashed, held_out), kind="sort")
    kind = np.uint32 if len(hashed) < 2**32 else np.int64
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir(parents=True)
    try:
        np.save(temporary / "eval.npy", np.flatnonzero(is_held).astype(kind))
        np.save(temporary / "train.npy", np.flatnonzero(~is_held).astype(kind))
        fsync_tree(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not is_split(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def held_out_groups(hashed: np.ndarray, held_out: int) -> np.ndarray:
    """The keys to hold out, in order of the keys, so that their examples come as close to `held_out` as groups allow.

    Args:
        hashed: uint64 [examples], keys in an order that says nothing of the prompts.
        held_out: examples asked for.

    Raises:
        DataError: there is one group only, and each part needs one.
    """
    groups, sizes = np.unique(hashed, return_counts=True)
    if len(groups) < 2:
        raise DataError(
            f"val_size holds prompts out with all of their pairs, and all {len(hashed)} examples have the same prompt: "
            "set val_split: example, or name an eval_dataset"
        )
    left, taken = held_out, []
    for number, size in enumerate(sizes.tolist()):
        if size <= left:
            taken.append(number)
            left -= size
            if left == 0:
                break
    others = np.setdiff1d(np.arange(len(groups)), taken)
    if left and len(others):  # one more group may be closer
        smallest = int(others[np.argmin(sizes[others])])
        if not taken or (sizes[smallest] < 2 * left and len(others) > 1):
            taken.append(smallest)
    if len(taken) == len(groups):
        taken.remove(int(np.argmin(sizes)))
    return groups[np.sort(np.asarray(taken, dtype=np.int64))]
