"""A real model and real pairs for the tests that need them; absent ones skip."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from demo.fetch_model import FetchError, fetch_model

ROOT = Path(__file__).parents[2]
SHARED_DATA = ROOT / "../shared/data"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, kept in .cache/ between runs."""
    try:
        return fetch_model(ROOT / ".cache" / "SmolLM2-135M-Instruct")
    except FetchError as error:
        pytest.skip(str(error))


def shared_file(name: str) -> Path:
    """A file of the real data sets beside the checkout."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs {name}, which is not part of the repository")
    return path.resolve()


def hh_rows(n: int, longest: int) -> list[dict[str, Any]]:
    """The first n rows of hh-rlhf harmless-base/test whose dialogues are at most `longest` characters."""
    rows = []
    with gzip.open(shared_file("hh_harmless_base_test.jsonl.gz"), "rt") as lines:
        for line in lines:
            row = json.loads(line)
            if max(len(row["chosen"]), len(row["rejected"])) <= longest:
                rows.append(row)
            if len(rows) == n:
                break
    return rows
