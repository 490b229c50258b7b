"""Folders that `datasets` saved, folders of splits, splits in a name, and plain text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Json, Value, disable_progress_bars

from dsdpo import cli
from dsdpo.data.readers import iter_rows, parse_row
from dsdpo.data.registry import resolve
from tests.helpers.field import read
from tests.helpers.tiny import save_model, tiny_llama_config
from tests.unit.data.conftest import model_folder  # noqa: F401

disable_progress_bars()


def records(n: int, word: str = "tree") -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {i}?", "chosen": f"{i}", "rejected": "No"} for i in range(n)]


def saved(folder: Path, **splits: int) -> None:
    """A DatasetDict, whose records name their split."""
    DatasetDict({name: Dataset.from_list(records(n, name)) for name, n in splits.items()}).save_to_disk(folder)


def shards(folder: Path) -> None:
    Dataset.from_list(records(10)).save_to_disk(folder, num_shards=3)


def reversed_state(folder: Path) -> None:
    """As after concatenating: the order of the records is that of state.json, not that of the names."""
    Dataset.from_list(records(4)).save_to_disk(folder, num_shards=2)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))


def with_cache(folder: Path) -> None:
    Dataset.from_list(records(10)).save_to_disk(folder)
    Dataset.from_list(records(5, "cache")).save_to_disk(folder.parent / "other")
    (folder.parent / "other/data-00000-of-00001.arrow").rename(folder / "cache-0123456789abcdef.arrow")


def selection(folder: Path) -> None:
    Dataset.from_list(records(20)).select(range(0, 20, 2)).save_to_disk(folder)


def gap(folder: Path) -> None:
    shards(folder)
    (folder / "data-00001-of-00003.arrow").unlink()


def own_split(folder: Path) -> None:
    """A Dataset that knows its split, as load_dataset gives it."""
    Dataset.from_list(records(4, "test"), split="test").save_to_disk(folder)


def one_of_two(folder: Path) -> None:
    """state.json names a part of the files that the folder was saved as."""
    Dataset.from_list(records(4)).save_to_disk(folder, num_shards=2)
    state = json.loads((folder / "state.json").read_text())
    del state["_data_files"][0]
    (folder / "state.json").write_text(json.dumps(state))


def file_of_another(folder: Path) -> None:
    """The file of another data set under the name of this one's."""
    Dataset.from_list([{**record, "note": "x"} for record in records(4)]).save_to_disk(folder.parent / "other")
    Dataset.from_list(records(4)).save_to_disk(folder)
    name = "data-00000-of-00001.arrow"
    (folder.parent / "other" / name).replace(folder / name)


def renamed_split(folder: Path) -> None:
    """A DatasetDict whose split `dev` was the split `train` of another set."""
    DatasetDict({"dev": Dataset.from_list(records(4, "test"), split="train")}).save_to_disk(folder)


def stream(end: int) -> Callable[[Path], object]:
    """An Arrow stream of two batches, without its last `end` bytes; negative: with a second stream behind it."""

    def write(path: Path) -> None:
        table = pa.Table.from_pylist(records(4))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        content = path.read_bytes()
        path.write_bytes(content[:-end] if end > 0 else content * (1 - end))

    return write


def hub_layout(folder: Path, **splits: int) -> None:
    folder.mkdir()
    for name, n in splits.items():
        pq.write_table(pa.Table.from_pylist(records(n, name)), folder / f"{name}-00000-of-00001.parquet")


def lines_and_text(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(2, "a")))
    (folder / "README.txt").write_text("what this is\n")


TREES, TEST = [f"tree {i}?" for i in range(10)], [f"test {i}?" for i in range(4)]
# how the folder is made, the name, the entry, exit code, the prompts
CASES: list[tuple[Callable[[Path], object], str, dict[str, Any] | None, int, list[str]]] = [
    (lambda p: Dataset.from_list(records(10)).save_to_disk(p), "saved", None, 0, TREES),
    (shards, "saved", None, 0, TREES),
    (with_cache, "saved", None, 0, TREES),
    (reversed_state, "saved", None, 0, [*TREES[2:4], *TREES[:2]]),
    (selection, "saved", None, 0, TREES[::2] + [f"tree {i}?" for i in range(10, 20, 2)]),
    (gap, "saved", None, 64, []),
    (lambda p: saved(p, train=3, test=4), "saved", None, 64, []),
    (lambda p: saved(p.parent, train=3, test=4), "saved/test", None, 0, TEST),
    (lambda p: saved(p.with_name("saved"), train=3, test=4), "saved:test", None, 0, TEST),
    (lambda p: saved(p.parent, train=3, test=4), "saved/dev", None, 64, []),
    (lambda p: saved(p, train=3, test=4), "saved", {"split": "test"}, 0, TEST),
    (lambda p: saved(p, train=3, test=4), "saved", {"split": "dev"}, 64, []),
    (lambda p: saved(p, test=4), "saved", None, 64, []),
    (lambda p: saved(p, train=2), "saved", None, 0, ["train 0?", "train 1?"]),
    (own_split, "saved", None, 0, TEST),
    (own_split, "saved", {"split": "train"}, 64, []),
    (lambda p: hub_layout(p, train=2, test=4), "hub", None, 64, []),
    (lambda p: hub_layout(p, train=2, test=4), "hub", {"split": "test"}, 0, TEST),
    (lambda p: hub_layout(p.with_name("hub"), train=2, test=4), "hub:test", None, 0, TEST),
    (lambda p: hub_layout(p, train_prefs=2), "hub", None, 64, []),
    (lambda p: hub_layout(p, train=2), "hub", None, 0, ["train 0?", "train 1?"]),
    (one_of_two, "saved", None, 64, []),
    (file_of_another, "saved", None, 65, []),
    (lambda p: saved(p.parent, train=3, test=4), "saved/test:train", None, 64, []),
    (lambda p: saved(p.parent, train=3, test=4), "saved/test:test", None, 0, TEST),
    (lambda p: saved(p.parent, train=3, test=4), "saved/test", {"split": "train"}, 64, []),
    (
        lambda p: saved(p.parents[1], train=3, test=4),
        "saved/test/data-00000-of-00001.arrow",
        {"split": "train"},
        64,
        [],
    ),
    (lambda p: saved(p.parents[1], train=3, test=4), "saved/test/data-00000-of-00001.arrow", None, 0, TEST),
    (lambda p: renamed_split(p.with_name("saved")), "saved:dev", None, 0, TEST),
    (lambda p: renamed_split(p.parent), "saved/dev", {"split": "train"}, 64, []),
    (stream(0), "stream.arrow", None, 0, TREES[:4]),
    (stream(8), "stream.arrow", None, 65, []),
    (stream(4), "stream.arrow", None, 65, []),
    (stream(200), "stream.arrow", None, 65, []),
    (stream(-1), "stream.arrow", None, 65, []),
    (lambda p: saved(p, train=3), "saved", {"split": "train[:1]"}, 64, []),
    (lines_and_text, "mixed", None, 0, ["a 0?", "a 1?"]),
]


@pytest.mark.parametrize(("make", "name", "entry", "code", "prompts"), CASES, ids=range(len(CASES)))
def test_a_folder_is_read_by_what_it_is(tmp_path, model_folder, make, name, entry, code, prompts) -> None:  # noqa: F811
    found = read(tmp_path / "run", model_folder, make, name, entry)
    assert found.exit_code == code, found.said
    assert [text[0] for text in found.texts] == prompts


def test_splits_are_named_where_one_must_be_chosen(tmp_path) -> None:
    saved(tmp_path / "saved", train=1, test_prefs=1)
    hub_layout(tmp_path / "layout", dev=1)
    for name in ("saved", "saved/none", "saved:none"):
        [problem] = resolve([name], tmp_path)[1]
        assert "train, test_prefs" in str(problem) and "saved/train" in str(problem)
    [problem] = resolve(["layout"], tmp_path)[1]
    assert "layout:dev" in str(problem)


def test_a_split_in_a_hub_id(tmp_path) -> None:
    entries, problems = resolve(["org/set:train_prefs", "org/set:train[:10%]", "org/set"], tmp_path)
    assert not problems
    assert [(entry.hub_id, entry.split) for entry in entries] == [
        ("org/set", "train_prefs"),
        ("org/set", "train[:10%]"),
        ("org/set", "train"),
    ]


def test_nulls_that_arrow_filled_in_are_left_out_and_json_stays(tmp_path) -> None:
    turns = [{"role": "user", "content": "hi", "name": "Ada"}, {"role": "assistant", "content": "hello"}]
    features = Features({"chosen": [{k: Value("string") for k in ("role", "content", "name")}], "extra": Json()})
    Dataset.from_list([{"chosen": turns, "extra": {"a": None}}], features=features).save_to_disk(tmp_path / "saved")
    entries, _ = resolve(["saved"], tmp_path)
    assert [parse_row(row) for _, row in iter_rows(entries[0])] == [{"chosen": turns, "extra": {"a": None}}]


def test_files_named_like_splits_are_splits(tmp_path) -> None:
    line = json.dumps(records(1)[0]) + "\n"
    for name in (
        "a/train.jsonl",
        "a/test.jsonl",
        "b/train_prefs.json",
        "b/test_prefs.json",
        "c/one.jsonl",
        "c/two.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line)
    read_files = {
        "a:test": ["test.jsonl"],
        "b:train_prefs": ["train_prefs.json"],
        "c": ["one.jsonl", "two.jsonl"],
        "c/one.jsonl:train": ["one.jsonl"],
        "a/test.jsonl": ["test.jsonl"],
    }
    for name, files in read_files.items():
        entries, problems = resolve([name], tmp_path)
        assert not problems and [file.name for file in entries[0].files] == files
    parts = ("c/one.jsonl:train[:1]", "a:train[1:]", "c:[:10%]")
    for name in ("a", "b", "a:val", "c:test", "c/one.jsonl:test", "a/test.jsonl:train", *parts):
        assert [problem.code for problem in resolve([name], tmp_path)[1]] == ["dataset"], name


@pytest.mark.parametrize("name", ["rows.txt", "rows.txt.gz"])
def test_plain_text_is_one_record_a_line_and_no_pair(tmp_path, model_folder, name) -> None:  # noqa: F811
    import gzip

    content = b"\xef\xbb\xbffirst line\r\n\n  \nsecond \xe2\x80\xa8 line"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    entries, _ = resolve([name], tmp_path)
    assert [(place, parse_row(row)) for place, row in iter_rows(entries[0])] == [
        (f"{name}:1", {"text": "first line"}),
        (f"{name}:4", {"text": "second \u2028 line"}),
    ]
    found = read(tmp_path / "run", model_folder, (tmp_path / name).read_bytes(), name)
    assert found.exit_code == 65 and "stage" in found.said


def test_the_command_line_names_the_splits_and_reads_one(tmp_path, model_folder, capsys) -> None:  # noqa: F811
    saved(tmp_path / "data/saved", train=3, test=4)
    save_model(model_folder, tiny_llama_config(vocab_size=512, max_position_embeddings=2048))
    run = tmp_path / "run.yaml"
    settings = {"model_name_or_path": model_folder, "dataset_dir": tmp_path / "data", "output_dir": tmp_path / "out"}
    run.write_text("dataset: saved\n" + "".join(f"{key}: {value}\n" for key, value in settings.items()))
    assert cli.main(["prepare", str(run)]) == 64
    assert "train, test" in capsys.readouterr().err
    assert cli.main(["prepare", str(run), "--dataset", "saved/test"]) == 0
    assert "4 records, 4 examples" in capsys.readouterr().out
