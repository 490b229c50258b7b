"""Which settings go with the kernels of the decoder layers, and what a report says of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsdpo.config import kernels
from dsdpo.config.schema import options_with
from tests.unit.config.test_quantization import codes

FULL = {"finetuning_type": "full"}

FINE: dict[str, tuple[dict[str, Any], int]] = {
    "auto under ZeRO-3": ({"kernels": "auto"}, 3),
    "none": ({"kernels": "none"}, 3),
    **{f"compile under ZeRO-{stage}": ({"kernels": "compile"}, stage) for stage in range(3)},
    "compile beside a live reference": ({"kernels": "compile", "reference": "live"}, 2),
    "compile in full": ({"kernels": "compile", **FULL}, 2),
    "deterministic": ({"deterministic": True}, 3),
}
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "compile under ZeRO-3": ({"kernels": "compile"}, 3, "kernels-zero3"),
    "a frozen reference under ZeRO-3": ({"kernels": "compile", "reference": "live", **FULL}, 2, "kernels-compile"),
    "compile over 4 bits": ({"kernels": "compile", "quantization_bit": 4}, 2, "kernels-compile"),
    "unknown": ({"kernels": "triton"}, 2, "value"),
}


@pytest.mark.parametrize("name", FINE)
def test_what_can_be_trained(tmp_path: Path, name: str) -> None:
    options, stage = FINE[name]
    assert codes(tmp_path, options, {"stage": stage}) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot(tmp_path: Path, name: str) -> None:
    options, stage, code = WRONG[name]
    assert codes(tmp_path, options, {"stage": stage}) == [code]


def test_liger_must_be_installed_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing_liger", lambda: "it is missing")
    assert codes(tmp_path, {"kernels": "liger"}, {"stage": 2}) == ["liger-missing"]
    assert codes(tmp_path, {"kernels": "auto"}, {"stage": 2}) == []
    monkeypatch.setattr(kernels, "missing_liger", lambda: "")
    assert codes(tmp_path, {"kernels": "liger"}, {"stage": 3}) == []


class Package:
    """A distribution, as importlib.metadata finds it."""

    def __init__(self, version: str) -> None:
        self.version = version


@pytest.mark.parametrize(
    ("version", "said"),
    [(None, "not installed"), ("0.8.4", "older than 0.8.5"), ("0.10.0", ""), ("0.8.5", ""), ("0.9.0.dev1", "")],
)
def test_which_liger_is_new_enough(version: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Package(version)] if version else []
    monkeypatch.setattr(kernels.importlib.metadata, "distributions", lambda name: found)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    missing = kernels.missing_liger()
    assert said in missing and bool(missing) == bool(said)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.missing_liger()


def test_a_resumed_run_may_change_both() -> None:
    assert {"kernels", "deterministic"} <= set(options_with("free"))
