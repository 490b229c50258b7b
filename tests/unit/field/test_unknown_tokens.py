"""Token ids that the model has no embedding for: found in prepare, and only where such ids occur."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsdpo.config.schema import RunConfig
from dsdpo.data.named_templates import NAMED
from dsdpo.data.prepare import prepare
from dsdpo.data.vocabulary import embedding_rows
from dsdpo.errors import DataError
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

NAME = "model.embed_tokens.weight"
PLAIN = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(3)]
MOOD = [PLAIN[0], {"prompt": "question", "chosen": "<mood>yes", "rejected": "no"}, PLAIN[1]]
ASKED = [PLAIN[0], PLAIN[1], {"prompt": "What is <mood>?", "chosen": "yes", "rejected": "no"}]
LOST = [PLAIN[0], {"prompt": "question", "chosen": "yes", "rejected": "a <mood>"}]


def save_model(folder: Path, weights: dict[str, int] | None, config: dict[str, Any] | None) -> int:
    """A tokenizer with the token <mood> as its last, weights and config.json; the id of <mood>."""
    tokenizer = make_tokenizer("chatml", NAMED["chatml"].jinja)
    tokenizer.add_tokens(["<mood>"])
    tokenizer.save_pretrained(folder)
    last = len(tokenizer) - 1
    for number, (name, rows) in enumerate((weights or {}).items()):
        tensors = {name: np.zeros((last + rows, 2), np.float32)}
        tensors |= {f"model.layers.{number}.mlp.weight": np.zeros((9999, 1), np.float32)}
        save_file(tensors, folder / f"model-{number}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return last


# rows of tensors and vocab_size relative to the id of <mood>: 0 means that it is the first unknown one
CASES: list[tuple[dict[str, int] | None, int | None, list[dict[str, str]], int, str]] = [
    ({NAME: 0}, 0, MOOD, 65, "rows.jsonl:2"),
    ({NAME: 0}, 0, ASKED, 65, "rows.jsonl:3"),
    ({NAME: 0}, 0, LOST, 65, "rows.jsonl:2"),
    ({NAME: -3}, None, MOOD, 65, "rows.jsonl:2"),
    ({NAME: 0}, 0, PLAIN, 0, ""),
    ({NAME: 1}, 1, MOOD, 0, ""),
    ({NAME: 64}, 0, MOOD, 0, ""),  # the weights go before config.json
    ({NAME: 0}, 64, MOOD, 65, "rows.jsonl:2"),
    ({"transformer.wte.weight": 0}, None, MOOD, 65, "rows.jsonl:2"),
    ({"gpt_neox.embed_in.weight": 1}, 0, MOOD, 0, ""),
    ({"model.language_model.embed_tokens.weight": 0, "lm_head.weight": 9}, 9, MOOD, 65, "rows.jsonl:2"),
    (None, 0, MOOD, 65, "rows.jsonl:2"),
    (None, 1, MOOD, 0, ""),
    (None, None, MOOD, 0, ""),  # no file tells
]


@pytest.mark.parametrize(("weights", "vocab", "records", "code", "place"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("nested", [False, True])
def test_ids_beyond_the_embedding(tmp_path, weights, vocab, records, code, place, nested) -> None:
    last = save_model(tmp_path / "model", weights, None)
    if vocab is not None:
        size = {"vocab_size": last + vocab}
        (tmp_path / "model/config.json").write_text(json.dumps({"text_config": size} if nested else size))
    found = read(tmp_path / "run", tmp_path / "model", records)
    assert found.exit_code == code, found.said
    if code:
        assert all(part in found.said for part in (place, "<mood>", str(last)))
    else:
        assert len(found.texts) == len(records)


def test_a_set_that_another_model_prepared_is_looked_at_again(tmp_path) -> None:
    settings = {"dataset": ["rows.jsonl"], "dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "runs/out")}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in MOOD))
    save_model(tmp_path / "large", {NAME: 1}, None)
    save_model(tmp_path / "small", {NAME: 0}, None)
    large = prepare(RunConfig(model_name_or_path=str(tmp_path / "large"), **settings), "train")
    with pytest.raises(DataError, match="<mood>"):
        prepare(RunConfig(model_name_or_path=str(tmp_path / "small"), **settings), "train")
    assert large is not None
    manifest = json.loads((large.path / "manifest.json").read_text())
    del manifest["largest_token"]  # as an earlier version wrote it
    (large.path / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(RunConfig(model_name_or_path=str(tmp_path / "small"), **settings), "train")


def test_an_adapter_with_embeddings_of_its_own_goes_before_the_model(tmp_path) -> None:
    last = save_model(tmp_path / "model", {NAME: 0}, None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert embedding_rows(str(tmp_path / "model"), str(adapter)) == (last, str(tmp_path / "model/model-0.safetensors"))
    tensors = {f"base_model.model.{NAME}": np.zeros((last + 2, 2), np.float32)}
    tensors |= {"base_model.model.model.layers.0.q_proj.lora_A.weight": np.zeros((8, 2), np.float32)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert embedding_rows(str(tmp_path / "model"), str(adapter)) == (
        last + 2,
        str(adapter / "adapter_model.safetensors"),
    )


def test_files_that_are_not_loaded_say_nothing(tmp_path) -> None:
    """As after a larger model was saved in the folder, or in other parts."""
    for name, rows in {
        "model.safetensors": 8,
        "model-00001-of-00002.safetensors": 9,
        "consolidated.safetensors": 7,
    }.items():
        save_file({NAME: np.zeros((rows, 2), np.float32)}, tmp_path / name)
    assert embedding_rows(str(tmp_path), None) == (8, str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    assert embedding_rows(str(tmp_path), None) == (9, str(tmp_path / "model-00001-of-00002.safetensors"))
    save_file({NAME: np.zeros((5, 2), np.float32)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {NAME: "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert embedding_rows(str(tmp_path), None) == (5, str(tmp_path / "model-00001-of-00001.safetensors"))


def test_damaged_files_tell_nothing(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "config.json").write_text("[]")
    assert embedding_rows(str(tmp_path), None) is None
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert embedding_rows(str(tmp_path), None) == (7, str(tmp_path / "config.json"))
    assert embedding_rows("org/never-loaded", None) is None
