"""The digest that tells one reference from another."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dsdpo.errors import ConfigError
from dsdpo.model.load import weights_digest
from tests.helpers.tiny import save_adapter, save_model, tiny_llama_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", tiny_llama_config())
    return tmp_path / "model"


def test_paths_names_and_versions_do_not_count(model: Path, tmp_path: Path) -> None:
    digest = weights_digest(str(model), tmp_path / "stamps")
    config = json.loads((model / "config.json").read_text())
    config.update(_name_or_path="elsewhere", transformers_version="9", dtype="bfloat16", use_cache=False)
    (model / "config.json").write_text(json.dumps(config))
    moved = model.rename(tmp_path / "moved")
    (moved / "model.safetensors").rename(moved / "weights.safetensors")
    assert weights_digest(str(moved), tmp_path / "stamps") == digest


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias"])
def test_what_the_config_says_of_the_computation_counts(model: Path, tmp_path: Path, key: str) -> None:
    digest = weights_digest(str(model), tmp_path / "stamps")
    config = json.loads((model / "config.json").read_text())
    assert key in config
    (model / "config.json").write_text(json.dumps({**config, key: "other"}))
    assert weights_digest(str(model), tmp_path / "stamps") != digest


def test_weights_put_in_place_with_the_old_size_and_date_are_seen(model: Path, tmp_path: Path) -> None:
    """Also when the first hash is remembered: the file is old enough for that."""
    weights = model / "model.safetensors"
    long_ago = (1_000_000_000_000_000_000, 1_000_000_000_000_000_000)
    os.utime(weights, ns=long_ago)
    digest = weights_digest(str(model), tmp_path / "stamps")
    size = weights.stat().st_size
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    os.utime(weights, ns=long_ago)
    assert weights.stat().st_size == size
    assert weights_digest(str(model), tmp_path / "stamps") != digest


def test_adapters_count_too(model: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "again", tiny_llama_config())
    save_adapter(tmp_path / "a", base, model, seed=1)
    base = save_model(tmp_path / "again", tiny_llama_config())
    save_adapter(tmp_path / "b", base, model, seed=2)
    digests = {weights_digest(str(folder), tmp_path / "stamps") for folder in (model, tmp_path / "a", tmp_path / "b")}
    assert len(digests) == 3


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        weights_digest(str(tmp_path), tmp_path / "stamps")
