"""Files that are not lines of UTF-8: read where they plainly can be, else refused as a whole with line and byte."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsdpo.data.likely_encoding import guess_encoding
from dsdpo.data.readers import iter_rows, parse_row
from dsdpo.data.registry import resolve
from tests.helpers.field import read
from tests.unit.data.conftest import model_folder  # noqa: F401

CHINESE = [
    {"prompt": "请介绍一下西湖的秋天。", "chosen": "湖水很静,叶子是金色的。", "rejected": "不知道。"},
    {"prompt": "怎样煮一碗好面?", "chosen": "水开以后再放面。", "rejected": "随便。"},
]
PLAIN = [{"prompt": f"Name river {i}.", "chosen": f"The Elbe {i}.", "rejected": "No."} for i in range(3)]
LATIN = [{"prompt": "Où est le café?", "chosen": "À côté de l'hôtel.", "rejected": "Là."}]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def csv(records: list[dict[str, Any]]) -> str:
    return "prompt,chosen,rejected\n" + "".join(",".join(f'"{v}"' for v in r.values()) + "\n" for r in records)


PRETTY_JAPANESE = [{"prompt": "東京の天気は?", "chosen": "はれです。", "rejected": "いいえ"}]
GZIPPED = gzip.compress(lines(PLAIN).encode())
TWO_LINES = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "ü", "chosen": "b", "rejected": "c"}\n'


def pretty(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()


def tarred(text: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text.encode()))
    return stream.getvalue()


# name of the file, its bytes, the place that is told
REFUSED = [
    ("gbk.jsonl", lines(CHINESE).encode("gbk"), ":1, byte 12"),
    ("big5.jsonl", lines([{"prompt": "台北的天氣", "chosen": "晴天", "rejected": "雨"}]).encode("big5"), ":1, byte 12"),
    ("sjis.csv", csv([{"p": "東京の天気は?", "c": "はれです。", "r": "いいえ"}]).encode("cp932"), ":2, byte 24"),
    ("latin1.csv", csv(LATIN).encode("cp1252"), ":2, byte 25"),
    ("latin1.json", json.dumps(LATIN, ensure_ascii=False).encode("latin-1"), ":1, byte 14"),
    ("gbk.jsonl.gz", gzip.compress(lines(CHINESE).encode("gb18030")), ":1, byte 12"),
    ("late.jsonl", TWO_LINES.encode("latin-1"), ":2, byte 60"),
    ("utf16.jsonl", lines(PLAIN).encode("utf-16"), ":1, byte 0"),
    ("utf16.csv", csv(PLAIN).encode("utf-16"), ":1, byte 0"),
    ("utf16le.jsonl", lines(CHINESE).encode("utf-16-le"), ":1, byte 0"),
    ("utf16be.json", json.dumps(PLAIN).encode("utf-16-be"), ":1, byte 0"),
    ("utf32.jsonl", lines(PLAIN).encode("utf-32"), ":1, byte 0"),
    ("utf32le.jsonl", lines(PLAIN).encode("utf-32-le"), ":1, byte 0"),
    ("mail.csv", csv([{"p": "東京の天気は?", "c": "はれです。", "r": "いいえ"}]).encode("iso2022_jp"), ":2, byte 24"),
    ("mail.json", json.dumps(PRETTY_JAPANESE, ensure_ascii=False).encode("iso2022_jp"), ":1, byte 13"),
    ("korean.csv", csv([{"p": "서울은?", "c": "맑아요.", "r": "몰라요."}]).encode("iso2022_kr"), ":2, byte 24"),
    ("hz.jsonl", lines(CHINESE).encode("hz"), ":1, byte 12"),
    ("hz.csv", csv(CHINESE).encode("hz"), ":2, byte 24"),
    ("utf7.jsonl", lines(LATIN).encode("utf-7"), ":1, byte 13"),
    ("utf7.csv", csv(CHINESE).encode("utf-7"), ":2, byte 24"),
    ("utf7.json", json.dumps(CHINESE, ensure_ascii=False).encode("utf-7"), ":1, byte 13"),
    ("utf7.jsonl.gz", gzip.compress((json.dumps(PLAIN[0]) + "\n" + lines(CHINESE)).encode("utf-7")), ":2, byte"),
    (
        "iconv7.jsonl",
        "".join(f"+AHsAIg-prompt+ACIAOgAi-O+APk +AOA c+APQ-t+AOk {i}+ACIAfQ-\n" for i in "abc").encode(),
        ":1, byte",
    ),
    ("damaged.jsonl", lines(CHINESE).encode() + b'{"prompt": "caf\xe9"}\n', ":3, byte"),
    ("commas.jsonl", lines(PLAIN).replace("\n", ",\n").encode(), f":1, byte {len(lines(PLAIN[:1])) - 1}"),
    ("cut.jsonl", lines(CHINESE).encode()[:-30], ":2, byte"),
    ("cesu.jsonl", lines(PLAIN).encode() + b'{"prompt": "\xed\xa0\xbd"}\n', ":4, byte"),
    ("nul.jsonl", lines(PLAIN[:1]).encode() + b"\0" * 40 + lines(PLAIN[1:]).encode(), ":2, byte"),
    ("array.jsonl", json.dumps(PLAIN).encode(), ":1, byte 0"),
    ("array.jsonl.gz", gzip.compress(b"\n " + pretty(PLAIN)), ":2, byte 1"),
    ("pretty.jsonl", b"\n".join(map(pretty, PLAIN)), ":1, byte 0"),
    ("pretty.json", pretty(PLAIN[0]), ":1, byte 0"),
    ("long.json", pretty({**PLAIN[0], "chosen": "river " * 300_000}), ":1, byte 0"),
    ("wrapped.json", pretty({"data": PLAIN}), ":1, byte 0"),
    ("wrapped_too.json", pretty({"version": "1.0", "n": 3, "rows": PLAIN}), ":1, byte 0"),
    ("wrapped_line.jsonl", json.dumps({"examples": PLAIN}).encode(), ":1, byte 0"),
    ("joined.jsonl", "".join(map(json.dumps, PLAIN)).encode(), f":1, byte {len(json.dumps(PLAIN[0]))}"),
    ("repr.jsonl", "".join(f"{record}\n" for record in PLAIN).encode(), ":1, byte 1"),
    ("prose.jsonl", b"Dear all,\nhere are the pairs.\n", ":1, byte 0"),
    ("cut.json", json.dumps(PLAIN)[:-40].encode(), ":1, byte"),
    ("two.json", (json.dumps(PLAIN) + "\n" + json.dumps(PLAIN)).encode(), ":2, byte"),
    ("comma.json", b'[{"prompt": "a"}\n {"prompt": "b"}]', ":2, byte 18"),
    ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ":1, byte 0"),
    ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ":1, byte 0"),
    ("page.json", b"<!DOCTYPE html>\n<html><body>Not found</body></html>", ":1, byte 0"),
    ("page.csv", b"\n<html lang='en'>\n", ":1, byte 0"),
    ("page.parquet", b"<html>Sign in</html>", ":1, byte 0"),
    ("empty.jsonl", b"", ":1, byte 0"),
    ("empty.json", b"\n\n", ":1, byte 0"),
    ("empty.parquet", b"", ":1, byte 0"),
    ("zipped.jsonl", GZIPPED, ":1, byte 0"),
    ("plain.jsonl.gz", lines(PLAIN).encode(), ":1, byte 0"),
    ("twice.jsonl.gz", gzip.compress(GZIPPED), ":1, byte 0"),
    ("bz2.jsonl", bz2.compress(lines(PLAIN).encode()), ":1, byte 0"),
    ("xz.jsonl", lzma.compress(lines(PLAIN).encode()), ":1, byte 0"),
    ("workbook.csv", b"PK\x03\x04" + bytes(60), ":1, byte 0"),
    ("pickle.json", pickle.dumps(PLAIN), ":1, byte 0"),
    ("extra.csv", b"prompt,chosen,rejected\nName one, please,yes,no\n", ":2"),
    ("cr.jsonl", lines(PLAIN).replace("\n", "\r").encode(), f":1, byte {len(lines(PLAIN[:1]))}"),
    ("cr.csv", csv(PLAIN).replace("\n", "\r").encode(), ":1, byte 0"),
    ("cr_inside.csv", csv(PLAIN).encode() + b"a\rb,c,d\n", ":5"),
    ("blank.csv", b"\n" + csv(PLAIN).encode(), ":1, byte 0"),
    ("tabs.csv", csv(PLAIN).replace(",", "\t").encode(), ":1, byte 0"),
    ("semicolons.csv", csv(PLAIN).replace(",", ";").encode(), ":1, byte 0"),
    ("sep.csv", ("sep=;\n" + csv(PLAIN).replace(",", ";")).encode(), ":1, byte 0"),
    ("sep_too.csv", ("sep=,\n" + csv(PLAIN)).encode(), ":1, byte 0"),
    ("spaces.csv", csv(PLAIN).replace('","', '", "').encode(), ":2"),
    ("spaces_too.csv", csv(PLAIN).replace(",", ", ").encode(), ":1, byte 0"),
    ("archive.jsonl", tarred(lines(PLAIN)), ":1, byte 0"),
    ("archive.jsonl.gz", gzip.compress(tarred(lines(PLAIN))), ":1, byte 0"),
    ("arrays.jsonl", "".join(f"[{json.dumps(record)}]\n" for record in PLAIN).encode(), ":1, byte 0"),
    ("arrays.json", "".join(f"[{json.dumps(record)}]\n" for record in PLAIN).encode(), ":2, byte"),
    ("nested.json", json.dumps([PLAIN, PLAIN]).encode(), ":1, byte 1"),
    ("by_column.json", pandas.DataFrame(PLAIN).to_json().encode(), ":1, byte 0"),
    ("by_column_too.json", pretty({key: [record[key] for record in PLAIN] for key in PLAIN[0]}), ":1, byte 0"),
    ("by_index.json", pandas.DataFrame(PLAIN).to_json(orient="index").encode(), ":1, byte 0"),
    ("table.json", pandas.DataFrame(PLAIN).to_json(orient="table").encode(), ":1, byte 0"),
    ("split.json", pandas.DataFrame(PLAIN).to_json(orient="split", indent=2).encode(), ":1, byte 0"),
    (
        "viewer.json",
        json.dumps({"rows": [{"row_idx": 0, "row": PLAIN[0]}], "num_rows_total": 1}).encode(),
        ":1, byte 0",
    ),
    ("viewer_rows.json", pretty([{"row_idx": 0, "row": PLAIN[0]}]), ":2, byte 4"),
    ("splits.json", json.dumps({"data": {"train": PLAIN}}).encode(), ":1, byte 0"),
    ("again.csv", (csv(PLAIN) + csv(PLAIN)).encode(), ":5"),
    ("open.csv", b'prompt,chosen,rejected\n"a,b,c\nd,e,f\n', ":3"),
    ("same.csv", b"prompt,chosen,chosen\na,b,c\n", ":1, byte 0"),
]


@pytest.mark.parametrize(("name", "content", "place"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_a_file_of_another_kind_is_refused_with_its_place(tmp_path, model_folder, name, content, place) -> None:  # noqa: F811
    found = read(tmp_path / "run", model_folder, content, name, max_refused=1.0)
    assert found.exit_code == 65 and not found.dropped
    assert f"{name}{place}" in found.said


NO_RECORDS = [
    ("none.json", b"[]"),
    ("header.csv", b"prompt,chosen,rejected\n"),
    ("lists.json", b'[["a", "b", "c"]]'),
    ("nulls.jsonl", b"null\nnull\n"),
    ("texts.jsonl", b'"a"\n"b"\n'),
    ("objects.jsonl", b"{}\n{}\n"),
    ("twice.jsonl", b'{"prompt": "a", "prompt": "b"}\n'),
    ("values.json", pandas.DataFrame(PLAIN).to_json(orient="values").encode()),
    ("rows.parquet", lambda path: pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)),
]


@pytest.mark.parametrize(("name", "content"), NO_RECORDS, ids=[name for name, _ in NO_RECORDS])
def test_no_entry_is_asked_for_where_there_is_no_record_to_describe(tmp_path, model_folder, name, content) -> None:  # noqa: F811
    found = read(tmp_path / "run", model_folder, content, name)
    assert found.exit_code == 65 and "dataset_info.json" not in found.said, found.said
    with_entry = read(tmp_path / "entry", model_folder, content, name, {"formatting": "trl"})
    assert with_entry.exit_code == 65


COMMAND = re.compile(r"((?:gunzip -c \S+ \| )?(?:jq|tr|tail|iconv) .*? > \S+|python -c '.*')")
CONVERTED = [
    "by_column.json",
    "split.json",
    "viewer.json",
    "arrays.jsonl",
    "nested.json",
    "cr.csv",
    "tabs.csv",
    "table.json",
]


@pytest.mark.parametrize("name", CONVERTED)
def test_the_command_that_is_told_converts_the_file(tmp_path, model_folder, name, monkeypatch) -> None:  # noqa: F811
    content = next(content for other, content, _ in REFUSED if other == name)
    command = COMMAND.search(read(tmp_path / "run", model_folder, content, name).said)
    assert command is not None
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shutil.which(command[1].split()[0]) is None:
        pytest.skip(f"no {command[1].split()[0]} here")
    subprocess.run(command[1], shell=True, check=True, cwd=tmp_path / "run/data")
    [made] = [path for path in (tmp_path / "run/data").iterdir() if path.name != name]
    found = read(tmp_path / "again", model_folder, made.read_bytes(), made.name)
    assert {text[0] for text in found.texts} >= {PLAIN[0]["prompt"]}, found.said


READ = [
    ("bom.jsonl", codecs.BOM_UTF8 + lines(PLAIN).encode()),
    ("bom.csv", codecs.BOM_UTF8 + csv(PLAIN).encode()),
    ("bom.json", codecs.BOM_UTF8 + pretty(PLAIN)),
    ("joined_boms.jsonl", b"".join(codecs.BOM_UTF8 + (json.dumps(record) + "\n").encode() for record in PLAIN)),
    ("crlf.jsonl", lines(PLAIN).replace("\n", "\r\n\r\n").encode()),
    ("array.json", json.dumps(PLAIN).encode()),
    ("pretty.json", pretty(PLAIN)),
    ("lines.json", lines(PLAIN).encode()),
    ("zipped.json.gz", gzip.compress(b"\n\n" + pretty(PLAIN))),
    ("no_newline.jsonl", lines(PLAIN).encode()[:-1]),
    ("quoted.csv", ('"prompt","chosen","rejected"\r\n' + csv(PLAIN).split("\n", 1)[1]).encode()),
]


@pytest.mark.parametrize(("name", "content"), READ, ids=[name for name, *_ in READ])
def test_utf8_is_read_whatever_is_around_the_records(tmp_path, model_folder, name, content) -> None:  # noqa: F811
    found = read(tmp_path / "run", model_folder, content, name)
    assert (found.exit_code, found.dropped) == (0, {}), found.said
    assert found.texts == [[r["prompt"], f"{r['chosen']}<|im_end|>", f"{r['rejected']}<|im_end|>"] for r in PLAIN]


ASCII = [
    "Write +1-800-555 and C++17, or +foo.",
    "In LaTeX: Fig.~{\\bf 3}, ~{, ~} and ~{ab~}.",
    "UTF-7 writes é as +AOk- and à as +AOA-, 1 + 1 = 2.",
    "HZ writes ~{<:Ky2;~} and ~{RV;~} in ~ASCII.",
    "caf+AOk-",
    "a+b+c",
    "\x1b(B plain",
    "~~~",
]


@pytest.mark.parametrize("text", ASCII)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_ascii_text_that_holds_a_mark_of_an_encoding_is_read(tmp_path, model_folder, name, text) -> None:  # noqa: F811
    text = text.encode("ascii", "backslashreplace").decode() if name == "a.csv" else text
    records = [{"prompt": text, "chosen": f"Yes {text}", "rejected": "No."}]
    content = {"a.jsonl": json.dumps(records[0]), "a.json": json.dumps(records), "a.csv": csv(records)}[name]
    found = read(tmp_path / "run", model_folder, content.encode(), name)
    assert (found.exit_code, [texts[0] for texts in found.texts]) == (0, [text]), found.said


LINES = [
    (b'{"prompt": "a", "chosen": "\\x41", "rejected": "c"}', "not_json"),
    (b'{"prompt": "a", "chosen": "it\\\'s", "rejected": "c"}', "not_json"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c"}{"prompt": 1}', "not_json"),
    (b'{"prompt": "a", "chosen": "b", "rejec', "not_json"),
    (b'{"prompt": "tab\there", "chosen": "b", "rejected": "c"}', "not_json"),
    (b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', "broken_unicode"),
    (b'["a", "b"]', "not_object"),
    (b'{"prompt": "a", "prompt": "z", "chosen": "b", "rejected": "c"}', "key_twice"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c", "id": ' + b"9" * 5000 + b"}", "not_json"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": ' + b"9" * 400 + b"}", "bad_score"),
    (b"[" * 100_000, "not_json"),
]


@pytest.mark.parametrize(("line", "code"), LINES, ids=range(len(LINES)))
def test_one_broken_line_among_others_is_dropped_by_name(tmp_path, model_folder, line, code) -> None:  # noqa: F811
    for place, content in enumerate((lines(PLAIN).encode() + line, line + b"\n" + lines(PLAIN).encode())):
        if place and line.startswith(b"["):
            continue  # a file that begins so is an array
        found = read(tmp_path / f"run{place}", model_folder, content, max_refused=0.5)
        assert (found.exit_code, found.dropped, len(found.texts)) == (0, {code: 1}, 3), found.said


def _saved(table: pa.Table, name: str) -> Any:
    def save(path: Path) -> None:
        if name.endswith(".parquet"):
            pq.write_table(table, path)
            return
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    return save


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.arrow"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.large_string(), pa.string_view()])
def test_text_columns_of_any_type_are_text(tmp_path, model_folder, name, kind) -> None:  # noqa: F811
    if name == "pairs.parquet" and kind == pa.string_view():
        pytest.skip("Parquet stores plain strings")
    columns = {key: pa.array([r[key].encode() for r in CHINESE], pa.binary()).cast(kind) for key in CHINESE[0]}
    found = read(tmp_path / "run", model_folder, _saved(pa.table(columns), name), name)
    assert found.exit_code == 0, found.said
    assert [text[0] for text in found.texts] == [record["prompt"] for record in CHINESE]


def test_binary_that_is_no_text_is_refused_where_it_is_read_alone(tmp_path, model_folder) -> None:  # noqa: F811
    columns = {key: pa.array([r[key].encode("gbk") for r in CHINESE]) for key in CHINESE[0]}
    entry = {"formatting": "alpaca", "columns": {"prompt": "prompt"}}
    found = read(tmp_path / "gbk", model_folder, _saved(pa.table(columns), "a.parquet"), "a.parquet", entry)
    assert found.exit_code == 65 and found.dropped == {"not_text": 2} and "not UTF-8" in found.said
    table = pa.table({**{key: [r[key] for r in PLAIN] for key in PLAIN[0]}, "thumb": [b"\x89PNG\xff"] * 3})
    found = read(tmp_path / "unread", model_folder, _saved(table, "a.parquet"), "a.parquet")
    assert (found.exit_code, len(found.texts)) == (0, 3), found.said


def values(column: pa.Array, folder: Path) -> list[Any]:
    """What a format gets of a Parquet column."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"value": column}), folder / "a.parquet")
    entries, problems = resolve(["a.parquet"], folder)
    assert not problems
    read_back = [json.loads(json.dumps(parse_row(row))) for _, row in iter_rows(entries[0])]
    return [record["value"] for record in read_back]


def test_values_of_arrow_become_what_json_can_hold(tmp_path) -> None:
    call = pa.struct([("name", pa.string()), ("city", pa.string()), ("days", pa.int64())])
    turn = pa.struct([("role", pa.string()), ("content", pa.binary()), ("calls", pa.list_(call))])
    told = [
        {"role": "user", "content": b"hi", "calls": None},
        {"role": "assistant", "content": None, "calls": [{"name": "f", "city": None, "days": 2}]},
    ]
    table: list[tuple[pa.Array, list[Any]]] = [
        (pa.array([Decimal("4.50"), None]), [4.5, None]),
        (pa.array([b"caf\xc3\xa9", None]), ["café", None]),
        (pa.array([86_400], pa.duration("s")), [86400.0]),
        (pa.array([0], pa.timestamp("s")), ["1970-01-01T00:00:00"]),
        (pa.array([1], pa.date32()), ["1970-01-02"]),
        (pa.array([2**31 - 1], pa.date32()), [{"no text": "a value of type date32[day]"}]),
        (pa.array([[("k", None)]], pa.map_(pa.string(), pa.int32())), [{"k": None}]),
        (pa.array(['{"a": null}', None], pa.json_()), [{"a": None}, None]),
        (pa.array(["x", "x"]).dictionary_encode(), ["x", "x"]),
        (pa.array([["a", None]]), [["a", None]]),
        (pa.array([None, None], pa.null()), [None, None]),
        (
            pa.array([told], pa.list_(turn)),
            [[{"role": "user", "content": "hi"}, {"role": "assistant", "calls": [{"name": "f", "days": 2}]}]],
        ),
    ]
    for number, (column, expected) in enumerate(table):
        assert values(column, tmp_path / str(number)) == expected


def test_nan_of_pandas_is_a_missing_value(tmp_path, model_folder) -> None:  # noqa: F811
    record = {"instruction": "a", "input": float("nan"), "output": ["b", "c"], "chosen_score": float("nan")}
    found = read(tmp_path / "run", model_folder, [record])
    assert (found.exit_code, len(found.texts)) == (0, 1) and "nan" not in found.texts[0][0], found.said


def test_large_arrays_are_read_in_pieces_to_the_same_records(tmp_path, monkeypatch) -> None:
    records = [{"prompt": "漢" * (i % 50), "chosen": i, "n": [i / 7, -1e-5, True, None, '\\"]}']} for i in range(400)]
    entries, _ = resolve(["a.json"], _folder(tmp_path, json.dumps(records, indent=1, ensure_ascii=False)))
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr("dsdpo.data.json_files._PIECE", size)
        found = [(place, parse_row(row)) for place, row in iter_rows(entries[0])]
        assert found == [(f"a.json:{i}", record) for i, record in enumerate(records, 1)]


def test_no_record_is_lost_behind_a_broken_first_line(tmp_path) -> None:
    good = [{"prompt": f"{i}", "chosen": "x" * 1000, "rejected": "n"} for i in range(1500)]
    (tmp_path / "a.jsonl").write_text('{"prompt": \n' + lines(good))
    entries, _ = resolve(["a.jsonl"], tmp_path)
    found = list(iter_rows(entries[0]))
    assert [place for place, _ in found] == [f"a.jsonl:{i}" for i in range(1, 1502)]
    assert [parse_row(row) for _, row in found[1:]] == good


def _folder(folder: Path, content: str) -> Path:
    (folder / "a.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("encoding", "codec", "text"),
    [
        ("GBK", "gbk", "小船很小"),
        ("BIG5", "big5", "請介紹一下台北的天氣。"),
        ("SHIFT_JIS", "cp932", "これはテストです。"),
        ("EUC-JP", "euc_jp", "東京の天気を教えてください。"),
        ("EUC-KR", "cp949", "서울의 날씨를 알려 주세요."),
        ("CP1251", "cp1251", "Скажите, какая сегодня погода?"),
        ("CP1252", "cp1252", "L'été à München"),
        ("", "cp1253", "Ποια είναι η πρωτεύουσα της Ελλάδας;"),
        ("", "cp1255", "מה בירת ישראל?"),
        ("", "koi8-r", "Скажите, какая сегодня погода?"),
        ("CP1252", "cp1252", "Don\u2019t say \u201cno\u201d, it costs 5 €."),
        ("CP1252", "latin-1", "Wie schön ist die Straße?"),
        ("CP1252", "cp1252", "le cœur, ¿dónde está?"),
        ("", "mac_roman", "Où est le café? À côté de l'hôtel."),
        ("", "mac_roman", "¿Dónde está? Aquí mañana."),
        ("", "mac_roman", "It\u2019s the café\u2019s \u201cfault\u201d."),
        ("", "cp850", "Wie schön ist die Straße? C'est l'été."),
        ("", "cp1254", "Çok güzel bir şehir, ağaçlar İstanbul."),
        ("", "cp1250", "Żółta łódź płynie."),
        ("", "cp1250", "Az őszi erdő gyönyörű."),
        ("", "cp1257", "Žmonės, ačiū."),
        ("", "mac_cyrillic", "Какво имаме днес? Много хубаво."),
        ("", "ascii", "plain"),
    ],
)
def test_the_encoding_that_is_named(encoding, codec, text) -> None:
    assert guess_encoding(f'{{"prompt": "{text}"}}'.encode(codec)) == encoding
