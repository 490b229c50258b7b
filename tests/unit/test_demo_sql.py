"""The demo's questions are what they promise, and their scoring is honest."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "demo"))

import make_data  # noqa: E402
import score_sql  # noqa: E402

HELDOUT_FILE = ROOT / "data" / "text_to_sql_heldout.jsonl"
TRAIN = score_sql.read_jsonl(ROOT / "data" / "text_to_sql_train.jsonl")
HELDOUT = score_sql.read_jsonl(HELDOUT_FILE)

ROW = {
    "question": "Who are the two oldest singers younger than 30?",
    "context": "CREATE TABLE singer (singer_id INTEGER, name VARCHAR, age INTEGER); "
    "CREATE TABLE concert (singer_id INTEGER, town VARCHAR, fee INTEGER)",
    "answer": "SELECT name FROM singer WHERE age < 30 ORDER BY age DESC LIMIT 2",
}


def test_data_files_regenerate_byte_for_byte(tmp_path: Path):
    make_data.write_data(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (ROOT / "data" / file.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_data_has_the_promised_shape():
    assert len(TRAIN) >= 300 and len(HELDOUT) == 40
    for row in TRAIN + HELDOUT:
        assert list(row) == ["question", "context", "answer"]
    questions = [row["question"] for row in TRAIN + HELDOUT]
    assert len(set(questions)) == len(questions)


def test_heldout_tables_do_not_occur_in_training():
    def tables(rows: list[dict[str, str]]) -> set[str]:
        return {table for row in rows for table in score_sql.read_schema(row["context"])}

    assert not tables(TRAIN) & tables(HELDOUT)


@pytest.mark.parametrize("row", HELDOUT + TRAIN[::6], ids=lambda row: row["question"])
def test_gold_answers_are_valid_and_right_and_weaker_ones_are_wrong(row: dict[str, str]):
    assert score_sql.is_valid(row["answer"], row["context"])
    assert score_sql.right_rows(row["answer"], row)
    for weak in score_sql.weaken(score_sql.parse_query(row["answer"])):
        assert not score_sql.right_rows(weak, row)


@pytest.mark.parametrize("row", HELDOUT, ids=lambda row: row["question"])
def test_filled_databases_have_rows_for_the_gold_answer(row: dict[str, str]):
    gold = score_sql.parse_query(row["answer"])
    for index in range(score_sql.DATABASES):
        database = score_sql.open_database(row["context"], gold, index)
        for table in score_sql.read_schema(row["context"]):
            assert 12 <= len(score_sql.run_query(database, f"SELECT * FROM {table}")) <= 30
        assert any(value for found in score_sql.run_query(database, row["answer"]) for value in found)


@pytest.mark.parametrize("row", HELDOUT, ids=lambda row: row["question"])
def test_trivial_answers_are_not_right(row: dict[str, str]):
    for table, columns in score_sql.read_schema(row["context"]).items():
        for wanted in ("*", "COUNT(*)", next(iter(columns))):
            trivial = f"SELECT {wanted} FROM {table}"
            assert score_sql.is_valid(trivial, row["context"])
            assert not score_sql.right_rows(trivial, row)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "name",
        "SELECT name",
        "SELECT FROM singer",
        "SELECT name, FROM singer",
        "SELECT name FROM singer LIMIT",
        "SELECT name FROM singer WHERE name = 'Mina",
        "Here is the query: SELECT name FROM singer",
        "SELECT name FROM singer\n\nThis query selects the names.",
        "```sql\nSELECT name FROM singer\n```",
        "SELECT name FROM singer; SELECT age FROM singer",
        "SELECT name FROM singers",
        "SELECT height FROM singer",
        'SELECT name FROM singer WHERE name = "Mina"',
        "SELECT T2.name FROM singer AS T1 JOIN concert AS T2 ON T1.singer_id = T2.singer_id",
        "SELECT singer_id FROM singer JOIN concert ON singer.singer_id = concert.singer_id",
        "SELECT name FROM sqlite_master",
        "DELETE FROM singer",
        "PRAGMA table_info(singer)",
    ],
)
def test_invalid_answers(answer: str):
    assert not score_sql.is_valid(answer, ROW["context"])
    assert not score_sql.right_rows(answer, ROW)


@pytest.mark.parametrize(
    "answer",
    [
        "select NAME from Singer where AGE < 30 order by AGE desc limit 2;",
        "SELECT T1.name FROM singer AS T1 WHERE T1.age <= 29 ORDER BY T1.age DESC LIMIT 2",
        "WITH y AS (SELECT name, age FROM singer WHERE age < 30) SELECT name FROM y ORDER BY age DESC LIMIT 2",
    ],
)
def test_another_wording_of_the_query_is_right(answer: str):
    assert score_sql.is_valid(answer, ROW["context"])
    assert score_sql.right_rows(answer, ROW)


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT name FROM singer WHERE age < 30 ORDER BY age LIMIT 2",
        "SELECT name FROM singer WHERE age < 30 ORDER BY age DESC LIMIT 3",
        "SELECT name FROM singer ORDER BY age DESC LIMIT 2",
        "SELECT age FROM singer WHERE age < 30 ORDER BY age DESC LIMIT 2",
    ],
)
def test_valid_but_wrong_answers(answer: str):
    assert score_sql.is_valid(answer, ROW["context"])
    assert not score_sql.right_rows(answer, ROW)


def test_row_order_matters_only_with_order_by():
    assert score_sql.same_rows([(1,), (2,), (2,)], [(2,), (1,), (2,)], ordered=False)
    assert not score_sql.same_rows([(1,), (2,)], [(2,), (1,)], ordered=True)
    assert not score_sql.same_rows([(1,), (2,)], [(1,), (2,), (2,)], ordered=False)


def test_endless_query_is_stopped():
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    with pytest.raises(score_sql.SqlError, match="interrupted"):
        score_sql.run_query(sqlite3.connect(":memory:"), endless)


def test_command_prints_counts_per_model(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    lines = [
        {
            "prompt": f"Question: {row['question']}",
            "base": "I do not know.",
            "tuned": row["answer"] if number % 4 else "SELECT 1",
        }
        for number, row in enumerate(HELDOUT)
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["score_sql", "--answers", str(answers), "--heldout", str(HELDOUT_FILE)])
    score_sql.main()
    assert capsys.readouterr().out.splitlines() == [
        "base: 40 answers, 0 valid SQL, 0 with right rows",
        "tuned: 40 answers, 40 valid SQL, 30 with right rows",
    ]


def test_answers_in_another_order_are_refused(tmp_path: Path):
    answers = tmp_path / "answers.jsonl"
    lines = [{"prompt": row["question"], "base": ""} for row in reversed(HELDOUT)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="line 1: the prompt does not contain"):
        score_sql.score_file(answers, HELDOUT_FILE)
