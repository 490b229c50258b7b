"""What preparing costs at 10^4, 10^5 and 10^6 records: `python bench/preparing.py [--records N,N] [--against PATH]`

Each line is one `dsdpo prepare` of short pairs from a .jsonl file, in a fresh process with an empty cache. Peak
anonymous memory (RssAnon) is that of the process and its children together, looked at ten times a second: pages of
mapped files are not in it, since the kernel takes those back when it needs them. maxrss is the kernel's high-water mark
of the largest process, with mapped files. CPU seconds are user and system time, which other work on the machine changes
least; the start (imports, the tokenizer) is in them.

`--against` names another checkout of dsdpo, which is measured in turn with this one; `--rounds` repeats both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache/SmolLM2-135M-Instruct"
MIB = 2**20
_EVERY_S = 0.1


@dataclass(frozen=True)
class Cost:
    """Of one `dsdpo prepare`: seconds, and MiB."""

    cpu: float
    wall: float
    anonymous: float
    maxrss: float

    def text(self, records: int) -> str:
        """In a line."""
        rates = f"{records / self.cpu:,.0f} a CPU second, {records / self.wall:,.0f} a second"
        return f"{rates}; anonymous {self.anonymous:.0f} MiB, maxrss {self.maxrss:.0f} MiB"


def main() -> None:
    """A line for each number of records, checkout and round."""
    parser = argparse.ArgumentParser(description="memory and speed of dsdpo prepare")
    parser.add_argument("--records", default="10000,100000,1000000")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder with a tokenizer")
    parser.add_argument("--against", type=Path, help="another checkout of dsdpo")
    parser.add_argument("--option", action="append", default=[], help="of the run config, such as val_size=0.05")
    arguments = parser.parse_args()
    checkouts = {"this": ROOT, **({"against": arguments.against.resolve()} if arguments.against else {})}
    for records in map(int, arguments.records.split(",")):
        costs: dict[str, list[Cost]] = {name: [] for name in checkouts}
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder, "pairs.jsonl"), records)
            for number in range(arguments.rounds):
                for name, checkout in checkouts.items():
                    options = dict(option.split("=", 1) for option in arguments.option)
                    options["preprocessing_num_workers"] = str(arguments.workers)
                    cost = measure(checkout, Path(folder), f"{name}-{number}", arguments.model, options)
                    costs[name].append(cost)
                    print(f"{name}: {records} records, {cost.text(records)}", flush=True)
        if arguments.against:
            this, against = (statistics.median(cost.cpu for cost in costs[name]) for name in ("this", "against"))
            print(f"{records} records: speed {against / this:.2f} of --against (medians of CPU seconds)", flush=True)


def write_pairs(path: Path, records: int) -> None:
    """Pairs of 20 to 60 tokens, all different."""
    with path.open("w") as stream:
        for i in range(records):
            total, parity = i + i % 97, ("even", "odd")[(i + i % 97) % 2]
            pair = {
                "prompt": [{"role": "user", "content": f"What is {i} plus {i % 97}, and is the sum even?"}],
                "chosen": [{"role": "assistant", "content": f"{total}, which is {parity}."}],
                "rejected": [{"role": "assistant", "content": f"I do not know what {i} is."}],
            }
            stream.write(json.dumps(pair) + "\n")


def measure(checkout: Path, folder: Path, name: str, model: Path, options: dict[str, str]) -> Cost:
    """One `dsdpo prepare`. Ends the program with its output if it fails."""
    config = folder / f"{name}.yaml"
    settings = {"model_name_or_path": str(model), "dataset": "pairs.jsonl", "dataset_dir": str(folder)}
    settings |= {"output_dir": str(folder / f"{name}/out"), "cache_dir": str(folder / f"{name}/cache")}
    config.write_text(yaml.safe_dump(settings))
    line = [sys.executable, "-m", "dsdpo", "prepare", str(config)]
    line += [word for key, value in options.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}
    log, began = config.with_suffix(".log"), time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(line, cwd=checkout, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        over, peak = threading.Event(), [0.0]
        watch = threading.Thread(target=_watch, args=(process.pid, over, peak), daemon=True)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)  # with what the process itself has waited for: its workers
        over.set()
        watch.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"dsdpo prepare of {checkout} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    wall = time.perf_counter() - began
    return Cost(usage.ru_utime + usage.ru_stime, wall, peak[0], usage.ru_maxrss / 1024)


def _watch(pid: int, over: threading.Event, peak: list[float]) -> None:
    """Keep the largest sum of RssAnon over a process and its children, in MiB."""
    while not over.wait(_EVERY_S):
        with suppress(psutil.Error):
            root = psutil.Process(pid)
            total = sum(_anonymous(process.pid) for process in (root, *root.children(recursive=True)))
            peak[0] = max(peak[0], total / MIB)


def _anonymous(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
