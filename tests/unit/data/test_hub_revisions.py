"""Revisions of models and data sets on Hugging Face, from a hub that is served on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.huggingface_hub import HuggingFace, commit_of, huggingface_hub
from tests.helpers.modelscope_hub import files_of
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

_SETS = """
import json, sys, time
from pathlib import Path
from dsdpo.data.hub_sets import load_hub
from dsdpo.data.registry import resolve
from dsdpo.errors import DsdpoError
time.sleep = lambda seconds: None  # between tries
found = {}
for name in sys.argv[1:]:
    [entry], _ = resolve([name], Path.cwd())
    try:
        found[name] = list(load_hub(entry)["x"])
    except DsdpoError as error:
        found[name] = error.exit_code
print(json.dumps(found))
"""
_MODEL = """
import json, sys
from pathlib import Path
import torch
from dsdpo.config.schema import RunConfig
from dsdpo.data.templates import load_tokenizer
from dsdpo.data.vocabulary import embedding_rows
from dsdpo.errors import DsdpoError
from dsdpo.model.attention.register import NAMES
from dsdpo.model.files import fetched_problems
from dsdpo.model.load import load_model, weights_digest
found = {}
for revision in sys.argv[1:]:
    settings = {"model_name_or_path": "org/tiny", "dataset": ["x"], "output_dir": "out", "max_length": 64}
    config = RunConfig(**settings, model_revision=None if revision == "main" else revision)
    if problems := fetched_problems(config):
        found[revision] = [problem.code for problem in problems]
        continue
    words = len(load_tokenizer(*config.model_source.place()))
    try:
        model = load_model("org/tiny", config, {}, NAMES["sdpa"], torch.float32)
    except DsdpoError as error:
        found[revision] = error.exit_code
        continue
    place, pinned = config.model_source.place()
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    rows, _ = embedding_rows(place, None, pinned)
    found[revision] = [words, model.config.bos_token_id, rows, total, weights_digest(place, Path("stamps"), pinned)]
print(json.dumps(found))
"""


def ask(program: str, hub: HuggingFace, folder: Path, *names: str, offline: str = "0") -> dict[str, object]:
    """What a process with a cache of its own gives."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HF_HUB_OFFLINE": offline}
    environment |= {"HF_TOKEN": "none", "NO_PROXY": "*", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", program, *names]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.start
def test_revisions_of_a_set(tmp_path: Path) -> None:
    """Offline, `datasets` gives the set that it has loaded last, whatever the revision: that is refused."""
    old, new = {"train.jsonl": b'{"x": 1}\n'}, {"train.jsonl": b'{"x": 2}\n{"x": 3}\n'}
    with huggingface_hub() as hub:
        hub.repositories["datasets/org/set"] = {"v1": old, "main": new}
        commit, latest = (f"org/set@{commit_of(files)}" for files in (old, new))
        names = ["org/set@v1", "org/set@v1:train[:1]", commit, "org/set", "org/set@v9", "org/none@v1"]
        found = ask(_SETS, hub, tmp_path, *names)
        assert found == dict(zip(names, [[1], [1], [1], [2, 3], 64, 64]))
        found = ask(_SETS, hub, tmp_path, "org/set", latest, commit, "org/set@v1", offline="1")
        assert found == {"org/set": [2, 3], latest: [2, 3], commit: 64, "org/set@v1": 64}


@pytest.mark.start
def test_revisions_of_a_model(tmp_path: Path) -> None:
    """Config, weights and tokenizer are those of one revision, with and without a network."""
    with huggingface_hub() as hub:
        revisions = hub.repositories["models/org/tiny"] = {}
        for seed, revision in enumerate(("v1", "main")):
            folder = tmp_path / revision
            save_model(folder, tiny_llama_config(bos_token_id=seed + 3, vocab_size=96 + seed), seed)
            save_tokenizer(folder)
            revisions[revision] = files_of(folder)
        commit = commit_of(revisions["v1"])
        online = ask(_MODEL, hub, tmp_path, "v1", "main", commit, "v9")
        assert online["v9"] == ["hub"]
        revisions["bare"] = {name: file for name, file in revisions["main"].items() if name != "model.safetensors"}
        assert ask(_MODEL, hub, tmp_path, "bare") == {"bare": 74}, "weights that the hub does not give"
        assert online["v1"] == online[commit] != online["main"]
        assert [online[name][1:3] for name in ("v1", "main")] == [[3, 96], [4, 97]]  # type: ignore[index]
        assert ask(_MODEL, hub, tmp_path, "v1", "main", commit, "v9", offline="1") == online
