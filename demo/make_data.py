"""Write the demo's text-to-SQL questions: `python demo/make_data.py [--to data]`.

The rows have the shape of the sql-create-context dataset (question, context, answer). Everything is
drawn from the tables in `sql_tables.py` with a fixed seed, so the files never change between runs.
Each question kind below is one small function; `KINDS` says how often each one is asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from sql_tables import HELDOUT, TRAIN, Number, Table, Text

SEED = 7
TRAIN_ROWS = 440
HELDOUT_ROWS = 40


@dataclass(frozen=True)
class Draft:
    """A question, its SQL, and the columns that the SQL names, by table name."""

    question: str
    answer: str
    used: dict[str, set[str]]


@dataclass(frozen=True)
class Condition:
    """One WHERE condition: how a person says it after the table's noun, and its SQL."""

    words: str
    sql: str
    column: str


@dataclass(frozen=True)
class Scene:
    """One table (and its parent, if any) to ask about."""

    rng: Random
    table: Table
    parent: Table | None = None

    @property
    def label(self) -> str:
        """The column that names the table's rows."""
        return self.table.label.name

    def text(self) -> Text:
        """A text column other than the label."""
        return self.rng.choice([column for column in self.table.columns if isinstance(column, Text)])

    def number(self) -> Number:
        """A number column."""
        return self.rng.choice([column for column in self.table.columns if isinstance(column, Number)])

    def say(self, *wordings: str, **values: object) -> str:
        """One of the wordings, with the table's nouns and the given values filled in."""
        name = self.table.label.words
        nouns = {"one": self.table.one, "many": self.table.many, "name": name, "names": plural(name)}
        return self.rng.choice(wordings).format(**nouns, **values)

    def select(self, question: str, wanted: str, rest: str, *columns: str) -> Draft:
        """A draft whose answer is SELECT `wanted` FROM the scene's own table, with `rest` after it."""
        answer = f"SELECT {wanted} FROM {self.table.name} {rest}".rstrip()
        return Draft(question, answer, {self.table.name: set(columns)})

    def select_joined(self, question: str, wanted: str, rest: str, own: set[str], parents: set[str]) -> Draft:
        """A draft whose answer joins the scene's table with its parent."""
        child, parent, key = self.table.name, self.parent.name, f"{self.parent.name}_id"
        join = f"{child} JOIN {parent} ON {child}.{key} = {parent}.{key}"
        answer = f"SELECT {wanted} FROM {join} {rest}".rstrip()
        return Draft(question, answer, {child: own | {key}, parent: parents | {key}})


def plural(words: str) -> str:
    """The plural of a column's words ("city" gives "cities", "opening year" gives "opening years")."""
    if words.endswith("y") and words[-2] not in "aeiou":
        return words[:-1] + "ies"
    return words + ("es" if words.endswith(("s", "x", "ch", "sh")) else "s")


def text_condition(rng: Random, column: Text) -> Condition:
    """The column equals one of its values."""
    value = rng.choice(column.values.split("|"))
    words = rng.choice((column.modifier.format(value), f"whose {column.words} is {value}"))
    return Condition(words, f"{column.name} = '{value}'", column.name)


def number_condition(rng: Random, column: Number) -> Condition:
    """The column is above or below a value inside its span."""
    low, high, step = column.span
    amount = rng.randrange(low + step, high, step)
    sign, natural, plain = rng.choice(((">", column.over, "above"), ("<", column.under, "below")))
    by_name = f"whose {column.words} is {plain} {amount}"
    words = rng.choice((natural.format(amount), by_name, by_name))
    return Condition(words, f"{column.name} {sign} {amount}", column.name)


def any_condition(rng: Random, table: Table, skip: str = "") -> Condition:
    """A condition on any column of the table but its label and `skip`."""
    column = rng.choice([column for column in table.columns if column.name != skip])
    make = text_condition if isinstance(column, Text) else number_condition
    return make(rng, column)


def list_rows(scene: Scene) -> Draft:
    """Names of the rows that meet one condition."""
    where = any_condition(scene.rng, scene.table)
    question = scene.say(
        "List the {name} of every {one} {where}.",
        "Find the {names} of the {many} {where}.",
        "What are the {names} of all {many} {where}?",
        "Give me the {name} of each {one} {where}.",
        where=where.words,
    )
    return scene.select(question, scene.label, f"WHERE {where.sql}", scene.label, where.column)


def list_rows_two_conditions(scene: Scene) -> Draft:
    """Names of the rows that meet a text and a number condition."""
    first = text_condition(scene.rng, scene.text())
    second = number_condition(scene.rng, scene.number())
    question = scene.say(
        "List the {name} of every {one} {first} and {second}.",
        "Find the {names} of the {many} {first} and {second}.",
        "What are the {names} of all {many} {first} and {second}?",
        first=first.words,
        second=second.words,
    )
    rest = f"WHERE {first.sql} AND {second.sql}"
    return scene.select(question, scene.label, rest, scene.label, first.column, second.column)


def two_columns(scene: Scene) -> Draft:
    """The name and one more column of the rows that meet one condition."""
    other = scene.number()
    where = any_condition(scene.rng, scene.table, skip=other.name)
    question = scene.say(
        "Show the {name} and the {other} of each {one} {where}.",
        "For every {one} {where}, list the {name} and the {other}.",
        "What are the {name} and {other} of the {many} {where}?",
        other=other.words,
        where=where.words,
    )
    wanted = f"{scene.label}, {other.name}"
    return scene.select(question, wanted, f"WHERE {where.sql}", scene.label, other.name, where.column)


def look_up(scene: Scene) -> Draft:
    """One value of one named row."""
    wanted = scene.rng.choice(scene.table.columns)
    value = scene.rng.choice(scene.table.label.values.split("|"))
    question = scene.say(
        "What is the {wanted} of the {one} {which}?",
        "Tell me the {wanted} of the {one} {which}.",
        "I need the {wanted} of the {one} {which}.",
        wanted=wanted.words,
        which=scene.table.label.modifier.format(value),
    )
    return scene.select(question, wanted.name, f"WHERE {scene.label} = '{value}'", scene.label, wanted.name)


def count_rows(scene: Scene) -> Draft:
    """How many rows meet one condition."""
    where = any_condition(scene.rng, scene.table)
    question = scene.say(
        "How many {many} {where} are there?",
        "Count the {many} {where}.",
        "What is the number of {many} {where}?",
        where=where.words,
    )
    return scene.select(question, "COUNT(*)", f"WHERE {where.sql}", where.column)


EXTREMES = (("MAX", "highest"), ("MAX", "maximum"), ("MIN", "lowest"), ("MIN", "minimum"))
AGGREGATES = (*EXTREMES, ("AVG", "average"), ("AVG", "average"), ("SUM", "total"), ("SUM", "total"))


def pick_aggregate(rng: Random, number: Number) -> tuple[str, str]:
    """An SQL function and its word; years are not averaged or added up."""
    return rng.choice(EXTREMES if "year" in number.name or number.name == "vintage" else AGGREGATES)


def aggregate(scene: Scene) -> Draft:
    """An aggregate of a number column over all rows."""
    number = scene.number()
    function, word = pick_aggregate(scene.rng, number)
    question = scene.say(
        "What is the {word} {number} of all {many}?",
        "Find the {word} {number} of the {many}.",
        "Give the {word} {number} over all {many}.",
        word=word,
        number=number.words,
    )
    return scene.select(question, f"{function}({number.name})", "", number.name)


def aggregate_where(scene: Scene) -> Draft:
    """An aggregate of a number column over the rows that meet one condition."""
    number = scene.number()
    function, word = pick_aggregate(scene.rng, number)
    where = any_condition(scene.rng, scene.table, skip=number.name)
    question = scene.say(
        "What is the {word} {number} of all {many} {where}?",
        "Find the {word} {number} of the {many} {where}.",
        "Give the {word} {number} over all {many} {where}.",
        word=word,
        number=number.words,
        where=where.words,
    )
    wanted = f"{function}({number.name})"
    return scene.select(question, wanted, f"WHERE {where.sql}", number.name, where.column)


def sort_rows(scene: Scene) -> Draft:
    """All names, sorted by a number column."""
    number = scene.number()
    order, words = scene.rng.choice(
        (
            ("ASC", "from lowest to highest"),
            ("ASC", "in ascending order of"),
            ("DESC", "from highest to lowest"),
            ("DESC", "in descending order of"),
        )
    )
    question = scene.say(
        "List the {name} of all {many} {words} {number}.",
        "Show every {one}'s {name}, sorted {words} {number}.",
        "Give the {names} of the {many} ordered {words} {number}.",
        words=words,
        number=number.words,
    )
    return scene.select(question, scene.label, f"ORDER BY {number.name} {order}", scene.label, number.name)


def top_row(scene: Scene) -> Draft:
    """The one row with the largest or smallest value of a column."""
    number = scene.number()
    order, word, natural = scene.rng.choice((("DESC", "highest", number.top), ("ASC", "lowest", number.bottom)))
    superlative = natural and scene.rng.random() < 0.4
    wordings = (
        (
            "What is the {name} of the {natural} {one}?",
            "Find the {name} of the {natural} {one}.",
            "Which {one} is the {natural}? Give the {name}.",
        )
        if superlative
        else (
            "What is the {name} of the {one} with the {word} {number}?",
            "Find the {name} of the {one} with the {word} {number}.",
            "Which {one} has the {word} {number}? Give the {name}.",
        )
    )
    question = scene.say(*wordings, natural=natural, word=word, number=number.words)
    rest = f"ORDER BY {number.name} {order} LIMIT 1"
    return scene.select(question, scene.label, rest, scene.label, number.name)


def top_rows(scene: Scene) -> Draft:
    """The few rows with the largest or smallest values of a column."""
    number = scene.number()
    order, word = scene.rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    count = scene.rng.randint(2, 5)
    question = scene.say(
        "List the {name} of the {count} {many} with the {word} {number}.",
        "What are the {names} of the {count} {many} with the {word} {number}?",
        "Find the {names} of the {count} {many} with the {word} {number}.",
        count=count,
        word=word,
        number=number.words,
    )
    rest = f"ORDER BY {number.name} {order} LIMIT {count}"
    return scene.select(question, scene.label, rest, scene.label, number.name)


def count_per_group(scene: Scene) -> Draft:
    """How many rows each value of a text column has."""
    group = scene.text()
    question = scene.say(
        "How many {many} are there for each {group}? Show the {group} and the count.",
        "For each {group}, show the {group} and the number of {many}.",
        "Show every {group} with its number of {many}.",
        group=group.words,
    )
    return scene.select(question, f"{group.name}, COUNT(*)", f"GROUP BY {group.name}", group.name)


def aggregate_per_group(scene: Scene) -> Draft:
    """An aggregate of a number column for each value of a text column."""
    group, number = scene.text(), scene.number()
    function, word = pick_aggregate(scene.rng, number)
    question = scene.say(
        "For each {group}, show the {group} and the {word} {number} of its {many}.",
        "Show every {group} with the {word} {number} of its {many}.",
        "What is the {word} {number} of the {many} for each {group}? Show the {group} first.",
        group=group.words,
        word=word,
        number=number.words,
    )
    wanted = f"{group.name}, {function}({number.name})"
    return scene.select(question, wanted, f"GROUP BY {group.name}", group.name, number.name)


def frequent_groups(scene: Scene) -> Draft:
    """The values of a text column that occur often enough."""
    group = scene.text()
    word, sign = scene.rng.choice((("more than", ">"), ("at least", ">=")))
    least = scene.rng.randint(2, 4)
    question = scene.say(
        "Which {groups} have {word} {least} {many}?",
        "List every {group} with {word} {least} {many}.",
        "Find the {groups} that have {word} {least} {many}.",
        group=group.words,
        groups=plural(group.words),
        word=word,
        least=least,
    )
    rest = f"GROUP BY {group.name} HAVING COUNT(*) {sign} {least}"
    return scene.select(question, group.name, rest, group.name)


def largest_group(scene: Scene) -> Draft:
    """The most or least common value of a text column."""
    group = scene.text()
    order, most, common = scene.rng.choice((("DESC", "most", "most common"), ("ASC", "fewest", "least common")))
    question = scene.say(
        "Which {group} has the {most} {many}?",
        "What is the {common} {group} among the {many}?",
        "Find the {group} with the {most} {many}.",
        group=group.words,
        most=most,
        common=common,
    )
    rest = f"GROUP BY {group.name} ORDER BY COUNT(*) {order} LIMIT 1"
    return scene.select(question, group.name, rest, group.name)


def distinct_values(scene: Scene) -> Draft:
    """The different values of a text column."""
    column = scene.text()
    question = scene.say(
        "What are the different {values} of the {many}?",
        "List the distinct {values} of all {many}.",
        "Show the different {values} of the {many}.",
        values=plural(column.words),
    )
    return scene.select(question, f"DISTINCT {column.name}", "", column.name)


def count_distinct(scene: Scene) -> Draft:
    """How many different values a text column has."""
    column = scene.text()
    question = scene.say(
        "How many different {values} do the {many} have?",
        "Count the distinct {values} of the {many}.",
        "What is the number of different {values} of the {many}?",
        values=plural(column.words),
    )
    return scene.select(question, f"COUNT(DISTINCT {column.name})", "", column.name)


def between(scene: Scene) -> Draft:
    """Names of the rows whose number lies between two values."""
    number = scene.number()
    low, high, step = number.span
    first, second = sorted(scene.rng.sample(range(low, high + 1, step), 2))
    question = scene.say(
        "List the {name} of every {one} whose {number} is between {first} and {second}.",
        "Find the {names} of the {many} whose {number} is between {first} and {second}.",
        "Which {many} have a {number} between {first} and {second}? Give the {name}.",
        number=number.words,
        first=first,
        second=second,
    )
    rest = f"WHERE {number.name} BETWEEN {first} AND {second}"
    return scene.select(question, scene.label, rest, scene.label, number.name)


def one_of(scene: Scene) -> Draft:
    """Names of the rows whose text is one of two values."""
    column = scene.text()
    first, second = scene.rng.sample(column.values.split("|"), 2)
    question = scene.say(
        "List the {name} of every {one} whose {column} is {first} or {second}.",
        "Find the {names} of the {many} whose {column} is {first} or {second}.",
        "Which {many} have {first} or {second} as their {column}? Give the {name}.",
        column=column.words,
        first=first,
        second=second,
    )
    rest = f"WHERE {column.name} IN ('{first}', '{second}')"
    return scene.select(question, scene.label, rest, scene.label, column.name)


def other_than(scene: Scene) -> Draft:
    """Names of the rows whose text is not a given value."""
    column = scene.text()
    value = scene.rng.choice(column.values.split("|"))
    question = scene.say(
        "List the {name} of every {one} whose {column} is not {value}.",
        "Find the {names} of all {many} with a {column} other than {value}.",
        column=column.words,
        value=value,
    )
    return scene.select(question, scene.label, f"WHERE {column.name} != '{value}'", scene.label, column.name)


def name_like(scene: Scene) -> Draft:
    """Names of the rows whose name starts with a letter or contains a word."""
    value = scene.rng.choice(scene.table.label.values.split("|"))
    words, letters, pattern = scene.rng.choice(
        (
            ("starts with", value[0], f"{value[0]}%"),
            ("contains", value.split()[-1], f"%{value.split()[-1]}%"),
        )
    )
    question = scene.say(
        "List the {name} of every {one} whose {name} {words} {letters}.",
        "Find the {many} whose {name} {words} {letters}. Give the {name}.",
        words=words,
        letters=letters,
    )
    return scene.select(question, scene.label, f"WHERE {scene.label} LIKE '{pattern}'", scene.label)


def beyond_average(scene: Scene) -> Draft:
    """Names of the rows whose number is above or below the average."""
    number = scene.number()
    sign, word = scene.rng.choice(((">", "above"), ("<", "below")))
    question = scene.say(
        "List the {name} of every {one} whose {number} is {word} average.",
        "Which {many} have a {number} {word} the average? Give the {name}.",
        "Find the {names} of the {many} whose {number} is {word} average.",
        number=number.words,
        word=word,
    )
    rest = f"WHERE {number.name} {sign} (SELECT AVG({number.name}) FROM {scene.table.name})"
    return scene.select(question, scene.label, rest, scene.label, number.name)


def join_names(scene: Scene) -> Draft:
    """Each row's name beside the name of its parent."""
    other = scene.parent.label
    question = scene.say(
        "Show the {name} of each {one} and the {other} of its {parent}.",
        "List the {name} of every {one} together with the {other} of its {parent}.",
        other=other.words,
        parent=scene.parent.one,
    )
    wanted = f"{scene.label}, {other.name}"
    return scene.select_joined(question, wanted, "", {scene.label}, {other.name})


def join_where(scene: Scene) -> Draft:
    """Names of the rows whose parent meets a condition."""
    own, where = scene.label, any_condition(scene.rng, scene.parent)
    question = scene.say(
        "List the {name} of every {one} {link} {parents} {where}.",
        "Find the {names} of the {many} {link} {parents} {where}.",
        "What are the {names} of all {many} {link} {parents} {where}?",
        link=scene.table.link,
        parents=scene.parent.many,
        where=where.words,
    )
    return scene.select_joined(question, own, f"WHERE {where.sql}", {own}, {where.column})


KINDS: dict[Callable[[Scene], Draft], int] = {
    list_rows: 3,
    list_rows_two_conditions: 2,
    two_columns: 2,
    look_up: 3,
    count_rows: 3,
    aggregate: 2,
    aggregate_where: 2,
    sort_rows: 2,
    top_row: 3,
    top_rows: 2,
    count_per_group: 2,
    aggregate_per_group: 2,
    frequent_groups: 1,
    largest_group: 1,
    distinct_values: 1,
    count_distinct: 1,
    between: 1,
    one_of: 2,
    other_than: 1,
    name_like: 1,
    beyond_average: 1,
    join_names: 2,
    join_where: 3,
}
"""Each question kind with its share."""
JOINS = (join_names, join_where)


def create_table(rng: Random, table: Table, used: set[str]) -> str:
    """A CREATE TABLE statement with the used columns, mostly among one that the question does not need."""
    types = {key: "INTEGER" for key in sorted(used) if key.endswith("_id")}
    for column in (table.label, *table.columns):
        types[column.name] = "VARCHAR" if isinstance(column, Text) else "INTEGER"
    spare = [name for name in types if name not in used]
    kept = used | set(rng.sample(spare, min(len(spare), rng.choice((0, 1, 1)))))
    columns = ", ".join(f"{name} {kind}" for name, kind in types.items() if name in kept)
    return f"CREATE TABLE {table.name} ({columns})"


def make_row(scene: Scene, kind: Callable[[Scene], Draft]) -> dict[str, str]:
    """One data row of this kind about the scene."""
    draft = kind(scene)
    tables = {table.name: table for table in (scene.table, scene.parent) if table}
    creates = [create_table(scene.rng, tables[name], used) for name, used in draft.used.items()]
    scene.rng.shuffle(creates)
    return {"question": draft.question, "context": "; ".join(creates), "answer": draft.answer}


def make_rows(tables: tuple[Table, ...], count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows, no answer twice; the kinds in `KINDS`' proportion, the tables about equally often."""
    rng = Random(seed)
    by_name = {table.name: table for table in tables}
    uses = dict.fromkeys(by_name, 0)
    deck: list[Callable[[Scene], Draft]] = []
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        if not deck:
            deck = [kind for kind, share in KINDS.items() for _ in range(share)]
            rng.shuffle(deck)
        kind = deck.pop()
        able = [table for table in tables if table.parent or kind not in JOINS]
        table = min(able, key=lambda table: (uses[table.name], rng.random()))
        row = make_row(Scene(rng, table, by_name.get(table.parent)), kind)
        if row["answer"] not in rows:
            rows[row["answer"]] = row
            uses[table.name] += 1
    return list(rows.values())


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> None:
    """Write the training and the held-out file into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "text_to_sql_train.jsonl", make_rows(TRAIN, TRAIN_ROWS, SEED))
    write_jsonl(folder / "text_to_sql_heldout.jsonl", make_rows(HELDOUT, HELDOUT_ROWS, SEED + 1))


def main() -> None:
    """Read the command line and write the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parents[1] / "data")
    write_data(parser.parse_args().to)


if __name__ == "__main__":
    main()
