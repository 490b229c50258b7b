"""Data sets of ModelScope, through its own client, from a hub that is served on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.data.fingerprint import source_digest
from dsdpo.data.prepare import prepare
from dsdpo.data.readers import iter_rows
from dsdpo.data.registry import DatasetEntry, hub_entries, resolve
from dsdpo.errors import ConfigError, DataError, IOFailure
from tests.helpers.modelscope_hub import ModelScope, files_of, modelscope_hub
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

pytest.importorskip("modelscope_hub")
NAME = "org/pairs"


def rows(*words: str) -> bytes:
    records = [{"prompt": "w3 w4", "chosen": f"{word} w5", "rejected": "w6"} for word in words]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScope]:
    """It has NAME with the branch master and the tag v1."""
    with modelscope_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        hub.repositories[f"datasets/{NAME}"] = {
            "v1": {"train.jsonl": rows("w10")},
            "master": {"train.jsonl": rows("w20", "w21"), "test.jsonl": rows("w30"), "README.md": b"# pairs\n"},
        }
        yield hub


def entry_of(name: str, tmp_path: Path) -> DatasetEntry:
    entries, problems = resolve([name], tmp_path, hub="modelscope")
    assert problems == []
    return entries[0]


def first_words(name: str, tmp_path: Path) -> list[str]:
    return [row["chosen"].split()[0] for _, row in iter_rows(entry_of(name, tmp_path))]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (NAME, ["w20", "w21"]),
        (f"{NAME}:test", ["w30"]),
        (f"{NAME}@v1", ["w10"]),
        (f"{NAME}@v1:train[:1]", ["w10"]),
        (f"{NAME}@master:train[1:]", ["w21"]),
    ],
)
def test_revision_and_split(hub: ModelScope, tmp_path: Path, name: str, words: list[str]) -> None:
    assert first_words(name, tmp_path) == words


def test_an_entry_names_subset_folder_and_revision(hub: ModelScope, tmp_path: Path) -> None:
    card = b"---\nconfigs:\n- config_name: hard\n  data_files: hard/*.jsonl\n---\n"
    files = {"README.md": card, "hard/a.jsonl": rows("w40"), "easy/a.jsonl": rows("w50")}
    hub.repositories["datasets/org/parts"] = {"v2": files}
    described = {"ms_hub_url": "org/parts", "revision": "v2"}
    info = {"hard": {**described, "subset": "hard"}, "easy": {**described, "folder": "easy"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert (first_words("hard", tmp_path), first_words("easy", tmp_path)) == (["w40"], ["w50"])


def test_the_digest_is_of_what_the_hub_has(hub: ModelScope, tmp_path: Path) -> None:
    entries = [entry_of(name, tmp_path) for name in (NAME, f"{NAME}@v1")]

    def digests(refresh: bool = True) -> list[str]:
        return [source_digest(entry, tmp_path / "stamps", refresh) for entry in entries]

    with pytest.raises(DataError):
        digests(refresh=False)
    master, pinned = digests()
    assert master != pinned
    assert digests(refresh=False) == [master, pinned]
    hub.repositories[f"datasets/{NAME}"]["master"]["train.jsonl"] = rows("w22")
    changed, same = digests()
    assert (changed != master, same) == (True, pinned)
    assert first_words(NAME, tmp_path) == ["w22"]


@pytest.mark.parametrize("away", [-1, 503])
def test_a_hub_that_is_away(hub: ModelScope, tmp_path: Path, away: int) -> None:
    """What is whole in the cache counts."""
    entry, stamps = entry_of(NAME, tmp_path), tmp_path / "stamps"
    hub.status = away
    with pytest.raises(IOFailure):
        source_digest(entry, stamps, refresh=True)
    hub.status = 0
    digest = source_digest(entry, stamps, refresh=True)
    hub.status = away
    assert source_digest(entry, stamps, refresh=True) == digest
    assert first_words(NAME, tmp_path) == ["w20", "w21"]


def test_a_set_that_has_come_in_part_is_not_read(
    hub: ModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub.repositories[f"datasets/{NAME}"]["master"]
    hub.missing = {"test.jsonl"}
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)
    with pytest.raises(IOFailure):
        source_digest(entry_of(NAME, tmp_path), tmp_path / "stamps", refresh=True)
    assert (tmp_path / "cache/datasets/org--pairs/snapshots/master/train.jsonl").read_bytes() == files["train.jsonl"]
    hub.status = -1
    with pytest.raises(IOFailure):
        first_words(NAME, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError):
        first_words(NAME, tmp_path)


@pytest.mark.parametrize("name", ["org/none", "org/none@v1", f"{NAME}@v9"])
def test_what_the_hub_does_not_have(hub: ModelScope, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        first_words(name, tmp_path)
    assert [problem.code for problem in caught.value.problems] == ["hub"]


def test_what_the_set_does_not_have(hub: ModelScope, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it has train: name one, as in org/pairs@v1:train"):
        first_words(f"{NAME}@v1:dev", tmp_path)
    with pytest.raises(DataError, match=r"name one, as in org/pairs@v1:default:train"):
        first_words(f"{NAME}@v1:default:dev", tmp_path)


def test_model_and_set_of_modelscope_are_prepared(hub: ModelScope, tmp_path: Path) -> None:
    """Another revision of the set, or of the tokenizer, is another prepared set."""
    save_model(tmp_path / "model", tiny_llama_config())
    save_tokenizer(tmp_path / "model")
    hub.repositories["models/org/tiny"] = {"master": files_of(tmp_path / "model")}
    settings = {"model_name_or_path": "org/tiny", "hub": "modelscope", "dataset_dir": str(tmp_path), "max_length": 64}
    settings |= {"output_dir": str(tmp_path / "out")}

    def prepared(name: str) -> Path:
        config = RunConfig(dataset=[name], **settings)
        assert [entry.hub_id for entry in hub_entries(config, frozenset())] == [NAME]
        found = prepare(config, "train")
        assert found is not None
        return found.path

    assert len({prepared(NAME), prepared(f"{NAME}@v1"), prepared(f"{NAME}@master")}) == 3
    assert prepared(NAME) == prepared(NAME)
