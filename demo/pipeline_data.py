"""Write the data of `make pipeline`: texts, questions with queries, and pairs of a right and a wrong query.

    python demo/pipeline_data.py --to FOLDER [--rows N] [--heldout M]

Held-out rows are about other tables than the ones to train on. A wrong query is the right one with one thing changed,
so it reads as well and answers something else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_data import make_rows
from sql_tables import HELDOUT, TRAIN

SEED = 11
_SWAPS = (
    ("MAX(", "MIN("), ("MIN(", "MAX("), ("AVG(", "SUM("), ("SUM(", "AVG("), (" DESC", ""), (" > ", " < "),
    (" < ", " > "), (" = ", " <> "), (" <> ", " = "), (" AND ", " OR "), ("COUNT(*)", "*"), ("DISTINCT ", ""),
)  # fmt: skip


def wrong(row: dict[str, str], rng: Random) -> str:
    """The query of a row with one thing changed: a column, an aggregate, a comparison, or without its condition."""
    answer = row["answer"]
    changed = [answer.replace(old, new, 1) for old, new in _SWAPS if old in answer]
    columns = re.findall(r"(\w+) (?:VARCHAR|INTEGER)", row["context"])
    for used in columns:
        others = [other for other in columns if other != used]
        if others and re.search(rf"\b{used}\b", answer):
            changed.append(re.sub(rf"\b{used}\b", rng.choice(others), answer, count=1))
    if " WHERE " in answer and " JOIN " not in answer:
        changed.append(re.sub(r" WHERE .*?(?= GROUP| ORDER| LIMIT|$)", "", answer))
    return rng.choice([some for some in changed if some != answer] or [answer + " LIMIT 1"])


def write(folder: Path, rows: int, heldout: int) -> None:
    """Write the six files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tables, count, seed in (("", TRAIN, rows, SEED), ("_heldout", HELDOUT, heldout, SEED + 1)):
        rng = Random(seed)
        made = make_rows(tables, 2 * count, seed)
        documents = [{"text": f"{row['context']};\n-- {row['question']}\n{row['answer']};"} for row in made[:count]]
        asked = [_asked(row) for row in made[count:]]
        pairs = [
            {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": wrong(row, rng)}]}
            for row, turns in zip(made[count:], asked)
        ]
        _write(folder / f"documents{name}.jsonl", documents)
        _write(folder / f"questions{name}.jsonl", [{"messages": turns} for turns in asked])
        _write(folder / f"pairs{name}.jsonl", pairs)


def _asked(row: dict[str, str]) -> list[dict[str, str]]:
    question = f"Write one SQL query that answers the question.\n\nSchema:\n{row['context']}\n\n{row['question']}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["answer"]}]


def _write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    """Read the command line and write the data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--heldout", type=int, default=120)
    options = parser.parse_args()
    write(options.to, options.rows, options.heldout)


if __name__ == "__main__":
    main()
