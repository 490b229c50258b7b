"""How close does `dsdpo prepare` come to the tokenizer alone? `python bench/tokenizing.py`

Ours is RowEncoder over raw rows, in batches of the size that `prepare` gives it: JSON, format, checks, chat template,
token ids, split, digest. Raw is `tokenizer(texts)` over the same text once: of every accepted pair the prompt, and
each completion as it follows the prompt, in batches of as many pairs. Both rates count the tokens that end up in the
set, p + c + r a pair; what ours spends on tokenizing a prompt again, or on rows that it refuses, is its own loss.

One process, one thread, SmolLM2's tokenizer; seconds are CPU seconds, which other work on the machine disturbs least.
Rounds alternate between the two; the ratio is the median over rounds of raw seconds / our seconds. `--profile` prints
where ours spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.fetch_model import fetch_model  # noqa: E402
from dsdpo.data.encode import Limits, RowEncoder  # noqa: E402
from dsdpo.data.pipeline import frozen  # noqa: E402
from dsdpo.data.readers import iter_rows  # noqa: E402
from dsdpo.data.registry import DatasetEntry, resolve  # noqa: E402
from dsdpo.data.templates import ExampleEncoder, load_tokenizer  # noqa: E402

SHARED = ROOT / "../shared/data"
SETS = {
    "hh_rlhf": (SHARED, "hh_harmless_base_test.jsonl.gz"),
    "sharegpt": (SHARED, "dpo_en_demo.json"),
    "text_to_sql": (ROOT / "data", "text_to_sql"),
}
MAP_ROWS = 256  # as in dsdpo/data/pipeline.py
UNCUT = Limits(max_length=10**9, truncation_mode="refuse", row_tokens=None, share_prefix=True)


def raw_batches(entry: DatasetEntry) -> list[dict[str, list[Any]]]:
    """The rows as the worker processes get them."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for _, row in iter_rows(entry)]
    parts = [lines[start : start + MAP_ROWS] for start in range(0, len(lines), MAP_ROWS)]
    return [{"row": part, "set": [0] * len(part), "source": [entry.name] * len(part)} for part in parts]


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(entry: DatasetEntry, encoder: ExampleEncoder, rounds: int, profile: bool) -> str:
    """One line: rows, tokens, both rates, their ratio and its range over the rounds."""
    rows, batches, tokenizer = RowEncoder(encoder, [entry], UNCUT), raw_batches(entry), encoder.tokenizer
    parts = [zip(encoded["prompt_ids"], encoded["completion_ids"]) for encoded in map(rows, batches)]
    found = [[ids for prompt, completions in batch for ids in (prompt, *completions)] for batch in parts]
    texts = [tokenizer.batch_decode([ids for ids in batch if ids]) for batch in found]
    tokens = sum(len(ids) for batch in found for ids in batch)

    def ours() -> None:
        for batch in batches:
            rows(batch)

    def raw() -> None:
        for batch in texts:
            tokenizer(batch, add_special_tokens=False)

    with frozen():  # as in prepare
        times = [(seconds(ours), seconds(raw)) for _ in range(rounds)]
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(ours)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(20)
    ratios = sorted(theirs / mine for mine, theirs in times)
    mine, theirs = (tokens / statistics.median(column) for column in zip(*times))
    return (
        f"{entry.name}: {sum(len(batch['row']) for batch in batches)} rows, {tokens} tokens; ours {mine:,.0f} tokens/s,"
        f" raw {theirs:,.0f}, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def main() -> None:
    """Every set of SETS that is here, a line each."""
    parser = argparse.ArgumentParser(description="dsdpo's tokenizing rate against the tokenizer alone")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--template", default="default")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    encoder = ExampleEncoder(load_tokenizer(str(fetch_model(ROOT / ".cache/SmolLM2-135M-Instruct"))), args.template)
    for formatting, (folder, name) in SETS.items():
        entries, problems = resolve([name], folder)
        if problems:
            print(f"{name}: skipped, {problems[0]}")
            continue
        print(measure(replace(entries[0], formatting=formatting), encoder, args.rounds, args.profile), flush=True)


if __name__ == "__main__":
    main()
