"""What the headers of a model folder's weight files tell: whether the files are whole, and the names in them.

No tensor is read and torch is not imported.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dsdpo.runtime.files import LFS_POINTER, LFS_TEXT

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# how names of token embeddings end, less `.weight`
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embed_tokens.base_layer")
_ZIP = b"PK\x03\x04"

Shapes = dict[str, tuple[int, ...]]


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that hold a model's weights, and what is wrong with the index that names them.

    Returns:
        Files that are there, empty without any; ends of sentences that begin with the folder's name.
    """
    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path], []
        if fault := damage(path):
            return [], [f"has a {name} that {fault}"]
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / shard for shard in shards]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [], [f"has a {name} that names no files of weights; download it again"]
        if not files:
            return [], [f"has a {name} that names no files of weights; download it again"]
        missing = [file.name for file in files if not file.is_file()]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        lacks = [f"lacks {', '.join(missing[:3])}{more}, which {name} names; download them"] if missing else []
        return [file for file in files if file.is_file()], lacks
    return [], []


def damage(path: Path) -> str:
    """Why a file of weights or of a tokenizer is not whole, as far as its ends tell; else an empty string."""
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if head.startswith(LFS_POINTER):
        return LFS_TEXT
    if path.suffix == ".json":
        with path.open("rb") as stream:
            stream.seek(-min(64, path.stat().st_size), os.SEEK_END)
            whole = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and stream.read().rstrip().endswith(b"}")
        return "" if whole else "is truncated or no JSON object: download it again"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            return f"is truncated or no safetensors file ({error}): download it again"
        return ""
    if not head or (head.startswith(_ZIP) and not zipfile.is_zipfile(path)):
        return f"is truncated, at {path.stat().st_size} bytes: download it again"
    return ""


def shapes(files: list[Path]) -> Shapes:
    """Tensor name -> shape, of safetensors files; empty for others, which have no header to tell."""
    found: Shapes = {}
    for path in files:
        if path.suffix != ".safetensors":
            return {}
        with safe_open(path, framework="np") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def indexed(folder: Path) -> set[str]:
    """Names of tensors that the index of safetensors files promises; empty without an index that can be read."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file() or (folder / "model.safetensors").is_file() or damage(path):
        return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def narrow(files: list[Path]) -> list[str]:
    """Matrices of safetensors files that are stored in 8 bits or fewer."""
    found = []
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                slices = ((name, file.get_slice(name)) for name in file.keys() if name.endswith(".weight"))  # noqa: SIM118
                found += [name for name, part in slices if _is_narrow(part.get_dtype(), len(part.get_shape()))]
    return found


def _is_narrow(dtype: str, dimensions: int) -> bool:
    return dimensions == 2 and dtype.startswith(("I8", "U8", "F8", "F4", "F6"))
