"""A weight file that was cut, or is something else, is told from its header and length; one that is whole is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dsdpo.runtime.weights import damage, shapes, weight_files


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.zeros((4, 8), np.float32), "a.bias": np.zeros(4, np.float32)}, path)
    return path


def test_a_whole_file_tells_its_tensors(whole: Path) -> None:
    assert damage(whole) == "" and weight_files(whole.parent) == ([whole], [])
    assert shapes([whole]) == {"a.weight": (4, 8), "a.bias": (4,)}


def test_every_cut_is_told(whole: Path) -> None:
    content = whole.read_bytes()
    for length in [0, 4, 8, 40, *range(len(content) - 40, len(content), 8), len(content) - 1]:
        whole.write_bytes(content[:length])
        assert "truncated" in damage(whole), length


@pytest.mark.parametrize("content", [b"<html>", b"\0" * 4096, b"version https://git-lfs.github.com/spec/v1\noid x\n"])
def test_what_is_no_weights_is_told(whole: Path, content: bytes) -> None:
    whole.write_bytes(content)
    assert damage(whole)


def test_a_pickle_is_cut_or_not(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.zeros(4, 8)}, path)
    assert damage(path) == "" and shapes([path]) == {} and weight_files(tmp_path) == ([path], [])
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "truncated" in damage(path), length


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    files, lacks = weight_files(tmp_path)
    assert not files and len(lacks) == 1


def test_shards_that_are_missing_are_named(whole: Path) -> None:
    shard = whole.rename(whole.with_name("model-00001-of-00003.safetensors"))
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {"weight_map": {f"{i}.weight": name for i, name in enumerate(names)}}
    (whole.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    files, lacks = weight_files(whole.parent)
    assert files == [shard] and len(lacks) == 1 and all(name in lacks[0] for name in names[1:])
