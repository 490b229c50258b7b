"""Runs that an earlier version began continue where they read the same data."""

from __future__ import annotations

from typing import Any

import pytest

from dsdpo.checkpoint.resume import _earlier_reading

RUN: dict[str, Any] = {"fingerprints": {"data": "old"}, "order": {"examples": 21}}
NOW: dict[str, Any] = {"earlier_fingerprints": {3: "old", 4: "newer"}, "examples": 21, "template_date": None}
NOT_THIRD = {"earlier_fingerprints": {4: "newer"}}
FOURTH: dict[str, Any] = {"fingerprints": {"data": "newer"}, "order": {"examples": 21}, "template_date": None}
DAY = {"template_date": "2026-11-26"}


@pytest.mark.parametrize(
    ("run", "now", "continues"),
    [
        (RUN, NOW, True),
        (RUN | {"order": {"pairs": 21}}, NOW, True),  # as the first version named them
        (RUN | {"order": {"examples": 20}}, NOW, False),
        (RUN, NOW | {"examples": 20}, False),
        (RUN, NOW | {"earlier_fingerprints": {3: "other"}}, False),
        (RUN, NOW | NOT_THIRD, False),
        (RUN, NOW | DAY | NOT_THIRD, False),
        (FOURTH, NOW, True),
        (FOURTH, NOW | NOT_THIRD, True),
        (FOURTH, NOW | {"examples": 20}, False),
        (FOURTH | DAY, NOW | DAY | NOT_THIRD, True),
        (FOURTH | DAY, NOW | {"template_date": "2026-11-25"}, False),
        (RUN, NOW | DAY, True),  # template_date says that it is the same day
        (RUN | DAY, NOW | {"template_date": "2026-11-25"}, False),
    ],
)
def test_it_continues_with_the_same_inputs_and_as_many_examples(run, now, continues):
    assert (_earlier_reading(run, now) == "") is continues


def test_what_to_do_is_said():
    assert "template_date" in _earlier_reading(RUN, NOW | DAY | NOT_THIRD)
    assert "20" in _earlier_reading(RUN, NOW | {"examples": 20})
