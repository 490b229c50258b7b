"""What a start costs: `dsdpo train` on two CPU ranks for one step of a tiny model, nearly all of it imports.

    python bench/starting.py [--rounds N] [--ranks N] [--against PATH]

The data is prepared and the reference store filled before the first measured start. CPU seconds are user and system
time of all processes of a run; other work on the machine changes them little, and wall seconds a lot. `--against`
names another checkout of dsdpo, whose starts are measured in turn with this one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORDS = 96
PAIRS = 40


@dataclass(frozen=True)
class Start:
    """CPU and wall seconds of one run, start to end."""

    cpu: float
    wall: float


def main() -> None:
    """Measure and print a line for each checkout, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description="CPU and wall seconds of a start")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--against", type=Path, help="another checkout of dsdpo")
    arguments = parser.parse_args()
    checkouts = {"this": ROOT, **({"against": arguments.against.resolve()} if arguments.against else {})}
    starts: dict[str, list[Start]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        config = make_run(Path(folder))
        for name, checkout in checkouts.items():
            start(checkout, config, Path(folder, f"{name}-first"), arguments.ranks)
        for number in range(arguments.rounds):
            for name, checkout in checkouts.items():
                found = start(checkout, config, Path(folder, f"{name}-{number}"), arguments.ranks)
                starts[name].append(found)
                print(f"{name} {number + 1}: CPU {found.cpu:.1f} s, wall {found.wall:.1f} s", flush=True)
    for name, measured in starts.items():
        print(f"{name}: {summary('CPU', [s.cpu for s in measured])}; {summary('wall', [s.wall for s in measured])}")
    if arguments.against:
        cpu, wall = (ratio(starts, attribute) for attribute in ("cpu", "wall"))
        print(f"ratio of the medians, this to against: CPU {cpu:.2f}, wall {wall:.2f}")


def summary(what: str, seconds: list[float]) -> str:
    """Smallest, median and largest of some seconds."""
    return f"{what} min {min(seconds):.1f} s, median {statistics.median(seconds):.1f} s, max {max(seconds):.1f} s"


def ratio(starts: dict[str, list[Start]], attribute: str) -> float:
    """The median of this checkout over the median of the other."""
    this, against = (statistics.median(getattr(s, attribute) for s in starts[name]) for name in ("this", "against"))
    return this / against


def start(checkout: Path, config: Path, output_dir: Path, ranks: int) -> Start:
    """One run to its end. Ends the program with the run's output if it fails."""
    line = [sys.executable, "-m", "dsdpo", "train", str(config), "--num_accelerators", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(checkout)}
    log = output_dir.with_suffix(".log")
    began = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*line, "--output_dir", str(output_dir)],
            cwd=checkout,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)  # with what the process itself has waited for: launcher and ranks
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"a start of {checkout} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return Start(cpu=usage.ru_utime + usage.ru_stime, wall=time.perf_counter() - began)


def make_run(folder: Path) -> Path:
    """A tiny Llama, pairs in its words, and the run config that trains it for one step without a checkpoint."""
    _save_model(folder / "model")
    pairs = [{"prompt": _words(i, 6), "chosen": _words(i + 7, 4), "rejected": _words(i + 13, 4)} for i in range(PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = folder / "run.yaml"
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset": "pairs.jsonl",
        "dataset_dir": str(folder),
        "cache_dir": str(folder / "cache"),
        "max_length": 64,
        "max_tokens_per_row": 128,
        "train_batch_size": 8,
        "max_steps": 1,
        "save_steps": None,
        "precision": "fp32",
        "disable_tqdm": True,
    }
    config.write_text(yaml.safe_dump(settings))
    return config


def _words(first: int, count: int) -> str:
    return " ".join(f"w{3 + (first * 5 + i) % (WORDS - 3)}" for i in range(count))


def _save_model(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    shape = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(shape).float().save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


if __name__ == "__main__":
    main()
