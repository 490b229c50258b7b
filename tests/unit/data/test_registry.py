"""dataset_info.json, names and paths: what resolves, and what is told instead of raised."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.readers import iter_rows, parse_row
from dsdpo.data.registry import resolve
from dsdpo.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "pairs.jsonl").write_text(LINES)
    return data


def describe(folder: Path, **entries: object) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(entries))


def one_problem(names: list[str], folder: Path) -> str:
    _, problems = resolve(names, folder)
    assert len(problems) == 1, problems
    return str(problems[0])


def rows_of(name: str, folder: Path, max_samples: int | None = None) -> list[tuple[str, object]]:
    entries, problems = resolve([name], folder)
    assert not problems
    return [(source, parse_row(row)) for source, row in iter_rows(entries[0], max_samples)]


def test_described_set_carries_its_entry(folder):
    sha1 = hashlib.sha1(LINES.encode()).hexdigest()
    entry = {
        "file_name": "pairs.jsonl",
        "file_sha1": sha1.upper(),
        "formatting": "trl",
        "ranking": True,
        "columns": {"chosen": "chosen"},
        "num_samples": 3,
        "allow_empty_rejected": True,
    }
    describe(folder, mine=entry)
    entries, problems = resolve(["mine"], folder)
    assert problems == []
    found = entries[0]
    assert found.files == (folder / "pairs.jsonl",)
    assert (found.formatting, found.columns, found.allow_empty_rejected) == ("trl", {"chosen": "chosen"}, True)
    assert [found.row_limit(n) for n in (None, 2, 9)] == [3, 2, 3]


def test_file_and_hub_id_need_no_entry(folder):
    entries, problems = resolve(["pairs.jsonl", "org/some-pairs"], folder)
    assert problems == []
    assert entries[0].files == (folder / "pairs.jsonl",)
    assert (entries[1].hub_id, entries[1].files, entries[1].split) == ("org/some-pairs", (), "train")


def test_path_from_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    entries, problems = resolve(["data/pairs.jsonl"], "data")
    assert problems == [] and entries[0].files == (folder / "pairs.jsonl",)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("org/pairs", ("org/pairs", None, "train")),
        ("org/pairs:test", ("org/pairs", None, "test")),
        ("org/pairs@v1.0", ("org/pairs", "v1.0", "train")),
        ("org/pairs@refs/pr/3:train[:10%]", ("org/pairs", "refs/pr/3", "train[:10%]")),
        ("described", ("org/pairs", "abc", "dev")),
    ],
)
def test_a_hub_set_has_a_revision(folder, name, found):
    describe(folder, described={"hf_hub_url": "org/pairs", "revision": "abc", "split": "dev"})
    [entry], problems = resolve([name], folder)
    assert problems == [] and (entry.hub_id, entry.revision, entry.split) == found


@pytest.mark.parametrize("name", ["pairs.jsonl@v1", "org/pairs.jsonl@v1", "org/pairs@"])
def test_files_have_no_revision(folder, name):
    assert one_problem([name], folder)


@pytest.mark.parametrize(("hub", "of_both"), [("huggingface", "hf/a"), ("modelscope", "ms/a")])
def test_the_run_s_hub_is_asked_where_both_have_the_set(folder, monkeypatch, hub, of_both):
    monkeypatch.setattr("dsdpo.data.registry.is_installed", lambda: True)
    describe(
        folder,
        hf={"hf_hub_url": "hf"},
        ms={"ms_hub_url": "ms"},
        both={"hf_hub_url": "hf/a", "ms_hub_url": "ms/a", "om_hub_url": "om/a", "file_name": "pairs.jsonl"},
    )
    entries, problems = resolve(["hf", "ms", "both", "org/plain", "pairs.jsonl"], folder, hub=hub)
    assert problems == []
    assert [entry.hub_id for entry in entries] == ["hf", "ms", of_both, "org/plain", None]
    is_ms = hub == "modelscope"
    assert [entry.modelscope for entry in entries] == [False, True, is_ms, is_ms, False]


@pytest.mark.parametrize(("name", "hub"), [("ms", "huggingface"), ("org/plain", "modelscope")])
def test_a_missing_client_is_told(folder, monkeypatch, name, hub):
    monkeypatch.setattr("dsdpo.data.registry.is_installed", lambda: False)
    describe(folder, ms={"ms_hub_url": "ms/a"})
    _, [problem] = resolve([name], folder, hub=hub)
    assert "pip install 'dsdpo[modelscope]'" in problem.text


def test_folder_elsewhere_does_not_hide_a_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org/pairs").mkdir(parents=True)
    entries, problems = resolve(["org/pairs"], folder)
    assert problems == [] and entries[0].hub_id == "org/pairs"


def test_folder_stands_for_its_files(folder):
    (folder / "many").mkdir()
    (folder / "many/b.jsonl").write_text(LINES)
    (folder / "many/a.json").write_text(json.dumps(ROWS[:1]))
    (folder / "many/notes.txt").write_text("not data")
    sources = [source for source, _ in rows_of("many", folder)]
    assert sources == ["many/a.json:1"] + [f"many/b.jsonl:{i}" for i in range(1, 6)]


def test_our_own_sets_resolve():
    data = Path(__file__).parents[3] / "data"
    info = json.loads((data / "dataset_info.json").read_text())
    others = {"kto_labelled": "labelled", "sql_notes": "texts"}
    for name, entry in info.items():
        records = others.get(name, "pairs" if entry.get("ranking") else "replies")
        entries, problems = resolve([name], data, records)  # type: ignore[arg-type]
        assert problems == [] and len(entries) == 1


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"file_name": "pairs.jsonl", "colums": {}}, "did you mean columns?"),
        ({"file_name": "pairs.jsonl", "columns": {"choosen": "c"}}, "did you mean chosen?"),
        ({"file_name": "pairs.jsonl", "columns": {"images": "i"}}, "only text"),
        ({"file_name": "pairs.jsonl", "tags": {"role": "r"}}, "did you mean role_tag?"),
        ({"file_name": "pairs.jsonl", "columns": ["chosen"]}, "columns must be a dict"),
        ({"file_name": "pairs.jsonl", "num_samples": "5"}, "num_samples must be a int"),
        ({"file_name": "pairs.jsonl", "num_samples": 0}, "at least 1"),
        ({"file_name": "pairs.jsonl", "formatting": "sharegtp"}, "not one of alpaca, sharegpt"),
        (
            {"file_name": "pairs.jsonl", "formatting": "trl", "columns": {"prompt": "q", "history": "h"}},
            "mine: formatting trl does not read columns.history; it reads prompt, chosen, rejected, system, tools,",
        ),
        (
            {"file_name": "pairs.jsonl", "formatting": "sharegpt", "columns": {"prompt": "q", "history": "h"}},
            "does not read columns.prompt, columns.history; it reads messages, chosen,",
        ),
        ({"file_name": "pairs.jsonl", "formatting": "alpaca", "columns": {"messages": "m"}}, "columns.messages; it"),
        ({"file_name": "pairs.jsonl", "ranking": False}, "no preference pairs"),
        ({"file_name": "pairs.jsonl", "file_sha1": "0" * 40}, "fetch the file again"),
        ({"file_name": "gone.jsonl"}, "does not exist"),
        ({"file_name": "../outside.jsonl"}, "outside dataset_dir"),
        ({"file_name": "empty"}, "holds no .jsonl"),
        ({"file_name": "notes.doc"}, "none of the kinds"),
        ({"script_url": "loader"}, "script_url is not supported"),
        ({"om_hub_url": "om/a", "file_name": "pairs.jsonl"}, "om_hub_url names a set on openMind"),
        ({"formatting": "trl"}, "needs file_name, hf_hub_url or ms_hub_url"),
        ({"revision": "v1", "file_name": "pairs.jsonl"}, "revision is of a set on a hub"),
        ("pairs.jsonl", "must be an object"),
    ],
)
def test_problem_of_an_entry(folder, entry, told):
    (folder.parent / "outside.jsonl").write_text(LINES)
    (folder / "empty").mkdir()
    (folder / "notes.doc").write_text("text")
    describe(folder, mine=entry)
    assert told in one_problem(["mine"], folder)


def test_only_named_entries_are_looked_at(folder):
    describe(folder, good={"file_name": "pairs.jsonl"}, bad={"script_url": "x", "nonsense": 1})
    assert resolve(["good"], folder)[1] == []


def test_problem_of_a_name(folder):
    describe(folder, hh_rlhf={"file_name": "pairs.jsonl"})
    assert "did you mean hh_rlhf?" in one_problem(["hh_rlfh"], folder)
    assert "it describes hh_rlhf" in one_problem(["zzz"], folder)
    assert "no such file" in one_problem(["missing.jsonl"], folder)
    assert "named twice" in one_problem(["hh_rlhf", "hh_rlhf"], folder)


def test_every_problem_is_told(folder):
    entries, problems = resolve(["gone.jsonl", "pairs.jsonl", "gone.csv"], folder)
    assert len(entries) == 1 and len(problems) == 2


def test_nothing_outside_dataset_dir_is_read(folder, tmp_path):
    outside = tmp_path / "outside.jsonl"
    outside.write_text(LINES)
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "many").mkdir()
    (folder / "many/link.jsonl").symlink_to(outside)
    for name in ("../outside.jsonl", "many/../../outside.jsonl", str(outside), "link.jsonl", "many"):
        assert "outside dataset_dir" in one_problem([name], folder)


def test_unreadable_info_file(folder):
    for text in ("{", "[]", '{"a": {"file_name": "x", "file_name": "y"}}', "{'a': 1}"):
        (folder / "dataset_info.json").write_text(text)
        assert "dataset_info.json" in one_problem(["pairs.jsonl"], folder)
    assert "is no folder" in one_problem(["x"], folder / "nowhere")


def test_lines_keep_their_numbers_and_broken_ones_are_refused(folder):
    (folder / "odd.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n"\\x"\n{"a": 2}')
    entries, _ = resolve(["odd.jsonl"], folder)
    seen = []
    for source, row in iter_rows(entries[0]):
        try:
            seen.append((source, parse_row(row)))
        except Dropped as refused:
            seen.append((source, refused.reason))
    assert seen == [
        ("odd.jsonl:1", {"a": 1}),
        ("odd.jsonl:3", "not valid JSON"),
        ("odd.jsonl:4", "not valid JSON"),
        ("odd.jsonl:5", {"a": 2}),
    ]


def test_every_kind_of_file_gives_the_same_rows(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    (folder / "array.json").write_text("\n " + json.dumps(ROWS))
    (folder / "lines.json").write_text(LINES)
    with gzip.open(folder / "zipped.jsonl.gz", "wt") as stream:
        stream.write(LINES)
    with gzip.open(folder / "zipped.json.gz", "wt") as stream:
        json.dump(ROWS, stream)
    pq.write_table(table, folder / "table.parquet")
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    text = "prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)
    (folder / "table.csv").write_text(text)
    for path in sorted(folder.iterdir()):
        found = rows_of(path.name, folder)
        first = 2 if path.suffix == ".csv" else 1  # lines of a CSV file begin with its header
        assert found == [(f"{path.name}:{i}", row) for i, row in enumerate(ROWS, first)], path.name


def test_only_the_first_rows_are_read(folder):
    assert len(rows_of("pairs.jsonl", folder, max_samples=2)) == 2


def test_damaged_file_is_an_error_that_names_it(folder):
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 50)[:-20])
    (folder / "bad.json").write_text('[{"a": 1},')
    (folder / "bad.parquet").write_bytes(b"not parquet")
    for name in ("cut.jsonl.gz", "bad.json", "bad.parquet"):
        with pytest.raises(DataError, match=name):
            rows_of(name, folder)


def test_lines_are_streamed(folder):
    """Reading the first row of a file that never ends returns."""
    pipe = folder / "endless.jsonl"
    os.mkfifo(pipe)
    entries, _ = resolve(["endless.jsonl"], folder)
    if os.fork() == 0:
        try:
            with pipe.open("wb", buffering=0) as stream:
                while True:
                    stream.write(b'{"a": 1}\n' * 1000)
        finally:
            os._exit(0)
    assert next(iter_rows(entries[0]))[0] == "endless.jsonl:1"
    os.wait()


def test_hub_set_is_loaded_by_datasets(folder, monkeypatch, tmp_path):
    """A folder in the working folder is what `datasets` takes for org/name without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org/pairs").mkdir(parents=True)
    (tmp_path / "org/pairs/train.jsonl").write_text(LINES)
    describe(folder, hub={"hf_hub_url": "org/pairs", "ranking": True})
    assert rows_of("hub", folder) == [(f"org/pairs:{i}", row) for i, row in enumerate(ROWS, 1)]
    describe(folder, hub={"hf_hub_url": "org/pairs", "split": "nowhere"})
    with pytest.raises(DataError, match=r"org/pairs has no split nowhere; it has train"):
        rows_of("hub", folder)
    assert [source for source, _ in rows_of("org/pairs:train", folder)] == [f"org/pairs:{i}" for i in range(1, 6)]
    describe(folder, hub={"hf_hub_url": "org/elsewhere"})
    with pytest.raises(ConfigError, match="org/elsewhere"):
        rows_of("hub", folder)
