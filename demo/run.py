"""What `make demo` does, from a fresh checkout to a tuned model, with the commands that a user would type.

    python demo/run.py [--num_accelerators N]

It fetches the model, trains configs/demo.yaml through the `deepspeed` launcher on 2 CPU ranks (on all GPUs where
there are some), exports the adapter, and shows what changed on 40 held-out questions.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.fetch_model import FetchError, fetch_model  # noqa: E402
from demo.score_sql import Score, read_jsonl, score  # noqa: E402

MODEL = Path(".cache/SmolLM2-135M-Instruct")
CONFIG = "configs/demo.yaml"
RUN = Path("outputs/demo")
ADAPTER = Path("outputs/demo-adapter")
HELD_OUT = Path("data/text_to_sql_heldout.jsonl")
SHOWN = 8
LONGEST_ANSWER = 48


def dsdpo(*arguments: str) -> None:
    """Run a dsdpo command in the open; ends the demo with its exit code when it fails."""
    print(f"\n$ dsdpo {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "dsdpo", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def heading(text: str) -> None:
    """A line that opens a part of the demo."""
    print(f"\n== {text}", flush=True)


def gpus() -> int:
    """Number of CUDA devices."""
    import torch

    return torch.cuda.device_count()


def compare(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """Answers of the base and of the tuned model to every row's question."""
    from transformers.utils.logging import disable_progress_bar

    from dsdpo.data.formats.conversations import SQL_PROMPT
    from dsdpo.tools.answers import AnswerSettings
    from dsdpo.tools.chat_model import load_both

    disable_progress_bar()

    prompts = [SQL_PROMPT.format(context=row["context"], question=row["question"]) for row in rows]
    base, tuned = load_both(str(ADAPTER), str(MODEL), AnswerSettings(max_new_tokens=LONGEST_ANSWER))
    return base.answers(prompts), tuned.answers(prompts)


def show(rows: list[dict[str, str]], base: list[str], tuned: list[str]) -> None:
    """The first few questions with both answers side by side."""
    from dsdpo.tools.screen import side_by_side

    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    for row, left, right in list(zip(rows, base, tuned))[:SHOWN]:
        print(f"\nQ: {row['question']}\n   {row['context']}")
        print(side_by_side(left, right, ("base", "tuned"), width))


def verdict(name: str, result: Score) -> str:
    """One line of counts."""
    return f"  {name:6} {result.valid:2} of {result.total} valid SQL over the given tables, {result.right:2} right rows"


def main() -> None:
    """Fetch, train, export, compare, tell what to try next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_accelerators", type=int, help="ranks (all GPUs, or 2 on a CPU)")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of libraries, to libraries
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # it misses a kernel that nothing here uses
    logging.getLogger("sqlglot").setLevel(logging.ERROR)  # the base's answers are often no SQL, which is no news
    start = time.monotonic()

    heading("the model")
    try:
        print(fetch_model(MODEL, ROOT / ".cache"), flush=True)
    except FetchError as error:
        sys.exit(f"demo: {error}")
    for leftover in (RUN, ADAPTER):
        if leftover.exists():
            print(f"removing {leftover} of an earlier demo")
            shutil.rmtree(leftover)

    heading("training: chosen is the SQL query, rejected is empty")
    ranks = options.num_accelerators or gpus() or 2
    dsdpo("train", CONFIG, "--num_accelerators", str(ranks))
    dsdpo("export", str(RUN), "--to", str(ADAPTER))

    heading("held-out questions, base model beside tuned model")
    rows = read_jsonl(HELD_OUT)
    base, tuned = compare(rows)
    show(rows, base, tuned)
    heading(f"all {len(rows)} held-out questions")
    base_score, tuned_score = score(base, rows), score(tuned, rows)
    print(verdict("base", base_score), verdict("tuned", tuned_score), sep="\n")

    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(
        f"\nThe demo took {minutes} min {seconds} s. Loss curve: {RUN / 'loss.png'}; metrics: {RUN / 'metrics.jsonl'}"
    )
    print(
        "Next:\n"
        f"  .venv/bin/dsdpo chat {RUN} --compare\n"
        f"  .venv/bin/dsdpo eval {CONFIG} --model {ADAPTER} --eval_dataset {HELD_OUT.stem} --output_dir outputs/eval\n"
        f"  .venv/bin/dsdpo export {RUN} --to outputs/demo-merged --merge\n"
        f"  .venv/bin/dsdpo train {CONFIG} --output_dir outputs/mine --beta 0.3   # reuses the reference log-probs\n"
        "  .venv/bin/dsdpo train --help"
    )


if __name__ == "__main__":
    main()
