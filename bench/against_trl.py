"""dsdpo beside TRL's DPOTrainer on the same pairs, model, precision and threads.

    python bench/against_trl.py [--cases 'hh-lora-*'] [--rounds 3] [--steps N] [--json FILE] [--markdown]

Every run is a fresh process (or a fresh launcher with its ranks): TRL and dsdpo in turn, in the next round dsdpo first,
so that a slow drift of the machine does not favour a side. docs/benchmarks.md tells what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cases import CPU_CASES, ROOT, SMOLLM2, Case, Side, with_steps
from bench.report import Result, machine, table
from bench.sides import BenchError, Run, make_ready


def compare(
    case: Case, rounds: int, warmup: int, work: Path, timeout: float, same_malloc: bool = False, until: float = math.inf
) -> Result:
    """All rounds of one case, told as they go. A side that failed once is not started again.

    Args:
        until: on time.monotonic(); no run of a side is started later, and one that goes on is ended.
    """
    result = Result(case, warmup)
    try:
        bench = make_ready(case, work, timeout, same_malloc)
    except BenchError as error:
        result.skipped = str(error)
        return result
    bench.until = until
    result.lengths = bench.lengths.tolist()
    sides = case.sides
    for number in range(rounds):
        runs: dict[Side, Run] = {}
        for side in sides if number % 2 == 0 else reversed(sides):
            why = result.failed(side) or ("no time is left" if time.monotonic() > until else None)
            runs[side] = Run(side, failed=why) if why else bench.run(side)
            told = runs[side].failed or (
                f"{result.pairs_per_second(runs[side]):.3f} pairs/s, "
                f"{' + '.join(f'{gb:.2f}' for gb in runs[side].memory_gb)} GiB, last loss {runs[side].losses[-1]:.6f}"
            )
            print(f"{case.name}, round {number + 1} of {rounds}, {side}: {told}", flush=True)
        result.rounds.append(runs)
    return result


def tell(results: list[Result], markdown: bool) -> None:
    """The table and the verdicts."""
    ran = [result for result in results if not result.skipped]
    print("\n" + table([result.cells() for result in ran], markdown=markdown) + "\n")
    for result in results:
        print(*result.verdicts(), sep="\n")


def arguments(description: str) -> argparse.ArgumentParser:
    """What the benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each side per case (3)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps per run (by case)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="first steps that are not timed (2)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds after which a run is ended")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "bench", metavar="DIR", help="for what runs write"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every step of every run")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    return parser


def end_runs_on_sigterm() -> None:
    """SIGTERM leaves by an exception, so that the run in progress is ended too and spoils no later measurement."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> None:
    """Choose, run, tell."""
    end_runs_on_sigterm()
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", default="*", metavar="GLOB", help="names to run, `a*,b*` (all)")
    parser.add_argument("--same_malloc", action="store_true", help="give TRL the allocator settings of dsdpo's ranks")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    options = parser.parse_args()
    globs = options.cases.split(",")
    cases = [with_steps(c, options.steps) for c in CPU_CASES if any(fnmatch(c.name, glob) for glob in globs)]
    if options.list or not cases:
        sys.exit("\n".join(case.name for case in CPU_CASES) if options.list else f"no case is named {options.cases}")
    if min(case.steps for case in cases) <= options.warmup:
        parser.error(f"--steps must exceed --warmup {options.warmup}")
    if not (SMOLLM2 / "config.json").exists():
        from demo.fetch_model import fetch_model

        fetch_model(SMOLLM2)
    told = machine()
    print(*told, sep="\n", flush=True)
    results = []
    for case in cases:
        results.append(
            compare(case, options.rounds, options.warmup, options.work, options.timeout, options.same_malloc)
        )
        if options.json:  # after every case: a long bench that is stopped has its numbers
            record = {"told": told, "options": vars(options), "results": [result.record() for result in results]}
            options.json.write_text(json.dumps(record, indent=1, default=str))
    tell(results, options.markdown)


if __name__ == "__main__":
    main()
