"""Stage pt: a text becomes chunks, each token scored once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.data.encode import chunks
from dsdpo.data.prepare import prepare, summary
from dsdpo.data.templates import EncodedExample
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("max_length", [2, 3, 8, 100])
def test_each_token_is_scored_once_behind_the_one_before_it(max_length: int, has_bos: bool) -> None:
    for size in (2, 3, 7, 8, 9, 15, 16, 64, 99, 100, 101, 250):
        ids = list(range(1, size + 1))
        text = EncodedExample([0] if has_bos else [], [ids], False, compares=False)
        whole = [0, *ids] if has_bos else ids
        found = chunks(text, max_length)
        scored = []
        for number, chunk in enumerate(found):
            tokens = [*chunk.prompt_ids, *chunk.completion_ids[0]]
            assert len(tokens) <= max_length
            assert tokens == whole[whole.index(tokens[0]) : whole.index(tokens[0]) + len(tokens)]
            assert len(chunk.prompt_ids) == (1 if number or has_bos else 0)
            scored += chunk.completion_ids[0] if chunk.prompt_ids else chunk.completion_ids[0][1:]
        assert scored == whole[1:]
        sizes = [len(chunk.completion_ids[0]) + len(chunk.prompt_ids) for chunk in found]
        assert max(sizes) - min(sizes) <= 1
        assert len(found) == -(-(len(whole) - 1) // (max_length - 1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tokenizer("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_lines_and_documents_are_read(tmp_path: Path, model: Path) -> None:
    lines = b"The sky is blue.\n\nSELECT name FROM city WHERE country = 'Chad'\n"
    found = read(tmp_path / "a", model, lines, name="words.txt", stage="pt")
    assert [texts[0] for texts in found.texts] == ["<s>", "<s>"]
    assert [texts[1] for texts in found.texts] == [
        "The sky is blue.</s>",
        "SELECT name FROM city WHERE country = 'Chad'</s>",
    ]
    records = [{"text": "The sky is blue. " * 9}, {"text": " "}, {"text": "Hello"}]
    found = read(tmp_path / "b", model, records, stage="pt", max_length=16, max_refused=0.5)
    assert dict(found.dropped) == {"empty_text": 1}
    assert "".join(texts[1] for texts in found.texts) == "The sky is blue. " * 9 + "</s>Hello</s>"
    assert "3 records" in found.said and f"{len(found.texts)} examples" in found.said and "1 dropped" in found.said


@pytest.mark.parametrize(
    "entry", [{"columns": {"prompt": "body"}}, {"formatting": "alpaca", "columns": {"prompt": "body"}}]
)
def test_entries_as_llama_factory_has_them(tmp_path: Path, model: Path, entry: dict) -> None:
    found = read(tmp_path / "a", model, [{"body": "The sky is blue."}], entry=entry, stage="pt")
    assert found.texts == [["<s>", "The sky is blue.</s>"]]


def test_what_is_no_text_is_told_with_its_stage(tmp_path: Path, model: Path) -> None:
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    found = read(tmp_path / "a", model, [pair], stage="pt")
    assert found.exit_code == 65 and "stage dpo" in found.said
    found = read(tmp_path / "b", model, [{"prompt": "p", "completion": "c"}], stage="pt")
    assert found.exit_code == 65 and "stage sft" in found.said
    found = read(tmp_path / "c", model, [{"text": "t"}], stage="dpo")
    assert found.exit_code == 65 and "stage pt" in found.said


def test_workers_and_a_split_by_document(tmp_path: Path, model: Path) -> None:
    """Chunks of one document are held out together; the number of processes changes nothing."""
    data = tmp_path / "data"
    data.mkdir()
    records = [{"text": f"{number} " + "The sky is blue. " * (1 + number % 5)} for number in range(40)]
    (data / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"model_name_or_path": str(model), "dataset": ["t.jsonl"], "dataset_dir": str(data), "stage": "pt"}
    settings |= {"max_length": 16, "val_size": 0.2}
    found = []
    for workers in (1, 2):
        config = RunConfig(**settings, output_dir=str(tmp_path / f"out{workers}/x"), preprocessing_num_workers=workers)
        parts = [prepare(config, split) for split in ("train", "eval")]
        sources = [{part.where(i) for i in range(len(part))} for part in parts]
        assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 40
        digests = [part.digests(np.arange(len(part))).tolist() for part in parts]
        found.append((digests, sources, summary(parts[0]).split("; longest")[0]))
    assert found[0] == found[1]
