"""Folders with generated tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.data.conftest import make_tokenizer


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[..., Path]:
    """(chat template, family) -> a folder with a tokenizer."""

    def make(template: str | None, family: str = "chatml", tokens: tuple[str, ...] = ()) -> Path:
        tokenizer = make_tokenizer(family, template)
        if tokens:
            tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        folder = tmp_path / "model"
        tokenizer.save_pretrained(folder)
        return folder

    return make
