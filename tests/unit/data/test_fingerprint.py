"""Fingerprints of earlier versions, as those versions computed them: by them their runs are known again."""

from __future__ import annotations

from pathlib import Path

from dsdpo.config.schema import RunConfig
from dsdpo.data.fingerprint import CODE_VERSION, earlier_fingerprints, set_fingerprint
from dsdpo.data.registry import DatasetEntry

CONFIG = RunConfig(
    model_name_or_path="m",
    dataset=["a"],
    output_dir="o",
    max_length=64,
    template="llama3",
    default_system="Be kind.",
    max_samples=7,
)
ENTRY = DatasetEntry(
    "a", Path("/d"), (Path("/d/a.jsonl"),), formatting="alpaca", columns={"prompt": "q"}, num_samples=5
)
THIRD, FOURTH = "022ba9e509667411d6d6106828bcdaf0", "fb124eef2fe1d2fa7359677b6a971848"
FIFTH = "303fa5e070876333ff42f80389e6b6b2"


def test_earlier_versions_are_known_by_what_they_computed():
    def earlier(date: str | None) -> dict[int, str]:
        return earlier_fingerprints(CONFIG, [ENTRY], "tok", ["src"], "{{ text }}", date)

    assert earlier("2026-11-26") == {4: FOURTH, 5: FIFTH}  # version 3 took the day of preparation
    assert earlier(None)[3] == THIRD and earlier(None)[4] != FOURTH
    now = set_fingerprint(CONFIG, [ENTRY], "tok", ["src"], "{{ text }}", "2026-11-26")
    assert now not in (THIRD, FOURTH, FIFTH) and CODE_VERSION not in earlier(None)
