"""Score generated SQL: `python demo/score_sql.py --answers FILE --heldout data/text_to_sql_heldout.jsonl`.

An answer is *valid* if it is one SELECT (or WITH) statement over its context's tables and columns, and
nothing else: prose around it or a markdown fence makes it invalid. A valid answer is *right* if it
gives the rows of the gold answer on several small SQLite databases, filled so that the gold query's
conditions, grouping, sorting and limit all matter.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.qualify import qualify

DATABASES = 3
"""An answer has to be right on this many differently filled databases."""
FILL_ATTEMPTS = 500
"""Random fills to try for each database before a gold query is called unusable."""
STEP_BUDGET = 1_000_000
"""SQLite virtual machine steps after which a query counts as failed."""
WORDS = ("amber", "birch", "cobalt", "delta", "ember", "fjord", "grove", "hazel", "iris", "juniper")
"""Text values beside the ones that a gold query names."""

Schema = dict[str, dict[str, str]]
Rows = list[tuple]


class SqlError(ValueError):
    """The text is not one query, names something unknown, or does not run."""


@dataclass
class Score:
    """How many answers of one model are valid, and how many give the right rows."""

    total: int = 0
    valid: int = 0
    right: int = 0


def read_schema(context: str) -> Schema:
    """Column types by table and column name (lower case), from CREATE TABLE statements."""
    schema: Schema = {}
    for create in sqlglot.parse(context, dialect="sqlite"):
        columns = create.find_all(exp.ColumnDef)
        schema[create.find(exp.Table).name.lower()] = {c.name.lower(): c.kind.sql("sqlite") for c in columns}
    return schema


def parse_query(text: str) -> exp.Query:
    """The text as one SELECT or WITH query; anything else is a `SqlError`."""
    if not text.lstrip().upper().startswith(("SELECT", "WITH")):
        raise SqlError(f"not a query: {text}")
    try:
        statements = sqlglot.parse(text, dialect="sqlite")
    except SqlglotError as error:
        raise SqlError(str(error)) from error
    if len(statements) != 1 or not isinstance(statements[0], exp.Select | exp.SetOperation):
        raise SqlError(f"not one query: {text}")
    return statements[0]


def check_names(query: exp.Query, schema: Schema) -> None:
    """Raise `SqlError` if the query names a table or column that the schema lacks, or leaves it unclear."""
    known = schema.keys() | {cte.alias.lower() for cte in query.find_all(exp.CTE)}
    for table in query.find_all(exp.Table):
        if table.name.lower() not in known:
            raise SqlError(f"unknown table {table.name}")
    try:
        qualify(query.copy(), schema=schema, dialect="sqlite")
    except SqlglotError as error:
        raise SqlError(str(error)) from error


def run_query(database: sqlite3.Connection, query: str) -> Rows:
    """The rows that a query gives; `SqlError` if SQLite refuses it or it takes too long."""
    database.set_progress_handler(lambda: 1, STEP_BUDGET)
    try:
        return [tuple(round(v, 6) if isinstance(v, float) else v for v in r) for r in database.execute(query)]
    except sqlite3.Error as error:
        raise SqlError(str(error)) from error


def is_valid(answer: str, context: str) -> bool:
    """Whether the answer is one query that SQLite can run and whose tables and columns are the context's.

    Names are resolved strictly: `T1.age` is wrong if the table behind T1 has no such column, and a value
    in double quotes is a column name (SQLite alone would take it for text).
    """
    try:
        check_names(parse_query(answer), read_schema(context))
        run_query(_load(context, {}), f"EXPLAIN {answer}")
    except SqlError:
        return False
    return True


def right_rows(answer: str, row: dict[str, str]) -> bool:
    """Whether the answer is valid and gives the gold answer's rows on each of the filled databases."""
    if not is_valid(answer, row["context"]):
        return False
    gold = parse_query(row["answer"])
    for index in range(DATABASES):
        database = open_database(row["context"], gold, index)
        try:
            rows = run_query(database, answer)
        except SqlError:
            return False
        if not same_rows(rows, run_query(database, row["answer"]), is_ordered(gold)):
            return False
    return True


def is_ordered(query: exp.Query) -> bool:
    """Whether the order of the query's rows is part of its result."""
    return query.args.get("order") is not None


def same_rows(rows: Rows, gold: Rows, ordered: bool) -> bool:
    """Whether two results are equal; without `ordered`, row order does not matter but counts do."""
    return rows == gold if ordered else Counter(rows) == Counter(gold)


def open_database(context: str, gold: exp.Query, index: int) -> sqlite3.Connection:
    """The `index`-th database for a gold query: the first random fill on which each part of it matters."""
    query, schema = gold.sql("sqlite"), read_schema(context)
    for attempt in range(FILL_ATTEMPTS):
        rng = Random(f"{index}/{attempt}/{query}")
        tables = {name: _fill(rng, name, types, gold) for name, types in schema.items()}
        database = _load(context, tables)
        rows = run_query(database, query)
        backwards = _load(context, {name: filled[::-1] for name, filled in tables.items()})
        without_ties = same_rows(run_query(backwards, query), rows, is_ordered(gold))
        if any(value for row in rows for value in row) and without_ties and _is_telling(database, gold, rows):
            return database
    raise ValueError(f"no fill of {FILL_ATTEMPTS} makes every part of this query matter: {query}")


def _is_telling(database: sqlite3.Connection, gold: exp.Query, rows: Rows) -> bool:
    """Whether each weakened form of the gold query finds something else than its rows."""
    return not any(same_rows(run_query(database, weak), rows, is_ordered(gold)) for weak in weaken(gold))


def _load(context: str, tables: dict[str, Rows]) -> sqlite3.Connection:
    """An in-memory database with these rows."""
    database = sqlite3.connect(":memory:")
    database.executescript(context)
    for table, rows in tables.items():
        database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    return database


def weaken(gold: exp.Query) -> Iterator[str]:
    """The query without one of its clauses, or without one of two conditions."""
    for clause in ("where", "having", "order", "limit", "distinct"):
        if gold.args.get(clause):
            weak = gold.copy()
            weak.set(clause, None)
            yield weak.sql("sqlite")
    where = gold.args.get("where")
    if where and isinstance(where.this, exp.And):
        for condition in (where.this.left, where.this.right):
            yield gold.copy().where(condition.copy(), append=False).sql("sqlite")


def _fill(rng: Random, table: str, types: dict[str, str], gold: exp.Query) -> Rows:
    """12 to 30 rows for one table."""
    count = rng.randint(12, 30)
    columns: list[list] = []
    for column, kind in types.items():
        named = _named_values(gold, column)
        if column in ("id", f"{table}_id"):
            columns.append(list(range(1, count + 1)))
        elif column.endswith("_id"):
            columns.append(rng.choices(range(1, 13), k=count))
        elif kind == "INTEGER":
            columns.append(_numbers(rng, [int(value) for value in named], count))
        else:
            columns.append(_texts(rng, named, count))
    return list(zip(*columns, strict=True))


def _named_values(gold: exp.Query, column: str) -> list[str]:
    """The literals that the gold query's conditions compare the column with."""
    predicates = [p for p in gold.find_all(exp.Predicate) if not p.find(exp.Query)]
    return [
        literal.name
        for predicate in predicates
        for literal in predicate.find_all(exp.Literal)
        if any(c.name.lower() == column for c in predicate.find_all(exp.Column))
    ]


def _texts(rng: Random, named: list[str], count: int) -> list[str]:
    """Repeating values: the named ones (patterns with % filled in) among a few others."""
    pool = [value.replace("%", "ova") for value in named] + rng.sample(WORDS, rng.randint(2, 6))
    return rng.choices(pool, k=count)


def _numbers(rng: Random, named: list[int], count: int) -> list[int]:
    """Values around the named ones, which all occur; values without a repeat if there are none."""
    if not named:
        return rng.sample(range(10, 500), count)
    margin = max(3, min(named) // 3)
    values = rng.choices(range(min(named) - margin, max(named) + margin + 1), k=count)
    return rng.sample(values[len(named) :] + named, count)


def score(answers: list[str], rows: list[dict[str, str]]) -> Score:
    """Count one model's valid and right answers."""
    result = Score(total=len(rows))
    for answer, row in zip(answers, rows, strict=True):
        result.valid += is_valid(answer, row["context"])
        result.right += right_rows(answer, row)
    return result


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score_file(answers_file: Path, heldout_file: Path) -> dict[str, Score]:
    """The score of each model in an answers file: each field other than "prompt" is a model."""
    answers, rows = read_jsonl(answers_file), read_jsonl(heldout_file)
    if len(answers) != len(rows):
        raise ValueError(f"{answers_file} has {len(answers)} rows, {heldout_file} has {len(rows)}")
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True), start=1):
        if row["question"] not in answer["prompt"]:
            raise ValueError(f"line {number}: the prompt does not contain the question {row['question']!r}")
    models = [field for field in answers[0] if field != "prompt"]
    return {model: score([answer[model] for answer in answers], rows) for model in models}


def main() -> None:
    """Read the command line and print one line of counts per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, required=True, help="JSONL: prompt and a field per model")
    parser.add_argument("--heldout", type=Path, required=True, help="JSONL: question, context and answer")
    options = parser.parse_args()
    for model, result in score_file(options.answers, options.heldout).items():
        print(f"{model}: {result.total} answers, {result.valid} valid SQL, {result.right} with right rows")


if __name__ == "__main__":
    main()
