"""Models of ModelScope, through its own client, from a hub that is served on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsdpo.config.hubs import ModelSource
from dsdpo.config.schema import RunConfig
from dsdpo.data.templates import load_tokenizer
from dsdpo.errors import ConfigError, IOFailure
from dsdpo.model.attention.register import NAMES
from dsdpo.model.files import fetched_problems
from dsdpo.model.load import load_model, weights_digest
from tests.helpers.modelscope_hub import ModelScope, files_of, modelscope_hub
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

pytest.importorskip("modelscope_hub")
NAME = "org/tiny-1.5"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScope]:
    """It has NAME with the branch master and the tag v1, which differ in their weights."""
    with modelscope_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
        hub.repositories[f"models/{NAME}"] = {"v1": model_files(tmp_path, 1), "master": model_files(tmp_path, 2)}
        yield hub


def model_files(tmp_path: Path, seed: int) -> dict[str, bytes]:
    folder = tmp_path / f"seed-{seed}"
    save_model(folder, tiny_llama_config(), seed)
    save_tokenizer(folder)
    return files_of(folder) | {".gitattributes": b"", "pytorch_model.bin": b"a copy", "tiny.gguf": b"another copy"}


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    settings = {"model_name_or_path": NAME, "hub": "modelscope", "dataset": ["x"], "output_dir": str(tmp_path / "out")}
    return RunConfig(**{**settings, "max_length": 64, **changes})


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("revision", "seed"), [(None, 2), ("v1", 1)])
def test_a_revision_gives_config_weights_and_tokenizer(
    hub: ModelScope, tmp_path: Path, revision: str | None, seed: int
) -> None:
    config = config_of(tmp_path, model_revision=revision)
    assert fetched_problems(config) == []
    assert hub.asked_files == ["config.json"]
    config.model_source.local("model_name_or_path", whole=True, refresh=True, stamps=tmp_path / "stamps")
    assert len(load_tokenizer(*config.model_source.place())) == 96
    model = load_model(NAME, config, {}, NAMES["sdpa"], torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / f"seed-{seed}")
    assert torch.equal(weights_of(model), weights_of(expected))
    assert model.name_or_path == model.config.name_or_path == NAME
    place, pinned = config.model_source.place(whole=True)
    assert weights_digest(place, tmp_path / "stamps", pinned) == weights_digest(
        str(tmp_path / f"seed-{seed}"), tmp_path / "stamps"
    )
    assert not {"pytorch_model.bin", "tiny.gguf"} & set(hub.asked_files), "transformers loads neither"


def test_a_file_is_fetched_once_and_again_when_it_changes(hub: ModelScope, tmp_path: Path) -> None:
    source, stamps = ModelSource(NAME, "modelscope"), tmp_path / "stamps"

    def fetch() -> list[str]:
        hub.asked_files.clear()
        source.local("model", whole=True, refresh=True, stamps=stamps)
        return sorted(hub.asked_files)

    files = hub.repositories[f"models/{NAME}"]["master"]
    assert "model.safetensors" in fetch()
    assert fetch() == []
    asked = len(hub.asked)
    assert source.place(whole=True) == (str(tmp_path / "cache/models/org--tiny-1.5/snapshots/master"), None)
    assert len(hub.asked) == asked, "the cache has it"
    files["config.json"] += b" "
    assert fetch() == ["config.json"]
    files["model-new.safetensors"] = files.pop("model.safetensors")
    with pytest.raises(ConfigError) as caught:
        fetch()
    assert [problem.code for problem in caught.value.problems] == ["hub-cache"]


@pytest.mark.parametrize("away", [-1, 503, 429])
def test_a_hub_that_is_away(hub: ModelScope, tmp_path: Path, away: int) -> None:
    """The cache counts if it is complete; an unfinished change of it does not."""
    source = ModelSource(NAME, "modelscope", "v1")
    hub.status = away
    with pytest.raises(IOFailure):
        fetched_problems(config_of(tmp_path))
    with pytest.raises(IOFailure):
        source.place()
    hub.status = 0
    folder = source.local("model", whole=True, refresh=True)
    hub.status = away
    assert source.local("model", whole=True, refresh=True) == folder
    assert fetched_problems(config_of(tmp_path, model_revision="v1")) == []
    with pytest.raises(IOFailure):
        ModelSource(NAME, "modelscope").local("model", whole=True)  # another revision
    (folder / "model.safetensors").unlink()
    with pytest.raises(IOFailure):
        source.local("model", whole=True, refresh=True)
    assert source.local("model", whole=False, refresh=True) == folder


def test_a_change_that_was_broken_off_is_not_taken_for_a_model(hub: ModelScope, tmp_path: Path) -> None:
    """The branch moves, config.json comes, and the hub is away before the weights do."""
    source = ModelSource(NAME, "modelscope")
    source.local("model", whole=True, refresh=True)
    files = hub.repositories[f"models/{NAME}"]["master"]
    files["config.json"] += b" "
    files["model.safetensors"] = hub.repositories[f"models/{NAME}"]["v1"]["model.safetensors"]
    assert fetched_problems(config_of(tmp_path)) == []
    hub.status = 503
    with pytest.raises(IOFailure):
        source.place(whole=True)
    hub.status = 0
    source.place(whole=True)
    hub.status = 503
    source.place(whole=True)


@pytest.mark.parametrize("whole", [True, False])
def test_a_first_fetch_that_was_broken_off_is_not_taken_for_a_model(
    hub: ModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Config, tokenizer.json and weights have come, and the file with the chat template has not."""
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)
    source, stamps = ModelSource(NAME, "modelscope"), tmp_path / "stamps"
    hub.missing = {"tokenizer_config.json"}
    for status in (0, 503):
        hub.status = status
        assert status or fetched_problems(config_of(tmp_path)) == []
        with pytest.raises(IOFailure):
            source.local("model", whole, refresh=True, stamps=stamps)
    hub.missing, hub.status = set(), 0
    folder = source.local("model", whole)
    assert (folder / "tokenizer_config.json").is_file()
    hub.status = 503
    assert source.local("model", whole) == folder


def test_a_look_at_the_small_files_leaves_a_whole_model_whole(hub: ModelScope) -> None:
    source = ModelSource(NAME, "modelscope")
    folder = source.local("model", whole=True)
    source.local("model", whole=False, refresh=True)
    hub.status = 503
    assert source.local("model", whole=True) == folder


def test_weights_of_before_do_not_speak_against_a_new_config(hub: ModelScope, tmp_path: Path) -> None:
    source = ModelSource(NAME, "modelscope")
    source.local("model", whole=True, refresh=True)
    wider = tmp_path / "wider"
    save_model(wider, tiny_llama_config(hidden_size=64), 3)
    hub.repositories[f"models/{NAME}"]["master"] |= files_of(wider)
    assert fetched_problems(config_of(tmp_path)) == []
    source.local("model", whole=True, refresh=True)
    assert fetched_problems(config_of(tmp_path)) == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(hub: ModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    ModelSource(NAME, "modelscope", "v1").local("model", whole=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv(variable, "1")
    hub.asked.clear()
    assert fetched_problems(config_of(tmp_path, model_revision="v1")) == []
    [problem] = fetched_problems(config_of(tmp_path))
    assert problem.code == "hub" and "modelscope download org/tiny-1.5" in problem.text
    assert hub.asked == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_name_or_path": "org/none"}, "there is no model org/none"),
        ({"model_name_or_path": "org/none", "model_revision": "v1"}, "there is no model org/none"),
        ({"model_revision": "v2"}, "has no revision v2 on ModelScope; it has v1, master"),
        ({"model_name_or_path": "gpt2"}, "gpt2 is no id of ModelScope"),
    ],
)
def test_what_the_hub_does_not_have(hub: ModelScope, tmp_path: Path, changes: dict[str, str], told: str) -> None:
    [problem] = fetched_problems(config_of(tmp_path, **changes))
    assert problem.code == "hub" and told in problem.text


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_hub_refuses(hub: ModelScope, tmp_path: Path, status: int) -> None:
    hub.status = status
    [problem] = fetched_problems(config_of(tmp_path))
    assert problem.code == "hub" and "MODELSCOPE_API_TOKEN" in problem.text


def test_a_missing_client_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsdpo.runtime.modelscope.is_installed", lambda: False)
    [problem] = fetched_problems(config_of(tmp_path))
    assert problem.code == "modelscope-missing" and "pip install 'dsdpo[modelscope]'" in problem.text


def test_folders_of_older_clients_count_for_the_default_revision(hub: ModelScope, tmp_path: Path) -> None:
    """They do not tell their revision: a pinned one is fetched beside."""
    older = tmp_path / "cache/hub/models/org/tiny-1___5"
    shutil.copytree(tmp_path / "seed-2", older)
    assert ModelSource(NAME, "modelscope").place(whole=True) == (str(older), None)
    place, _ = ModelSource(NAME, "modelscope", "v1").place(whole=True)
    assert Path(place, "model.safetensors").read_bytes() == (tmp_path / "seed-1/model.safetensors").read_bytes()
    assert (older / "model.safetensors").read_bytes() == (tmp_path / "seed-2/model.safetensors").read_bytes()


def test_the_check_of_a_run_imports_nothing_heavy(hub: ModelScope, tmp_path: Path) -> None:
    settings = json.dumps(config_of(tmp_path).model_dump(mode="json"))
    program = (
        "import json, sys\n"
        "from dsdpo.config.schema import RunConfig\n"
        "from dsdpo.model.files import fetched_problems\n"
        "assert fetched_problems(RunConfig(**json.loads(sys.argv[1]))) == []\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
