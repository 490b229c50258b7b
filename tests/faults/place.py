"""Whole runs of `dsdpo train` on a tiny model, to be killed, stopped, damaged and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.numpy
import yaml

from tests.dist.grid import zero_json
from tests.helpers.ranks import run_as_ranks, run_commands
from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600


class Place:
    """A folder with a model, data and cached reference, in which runs differ by their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_model(folder / "model", tiny_llama_config())
        save_tokenizer(folder / "model")
        save_pairs(folder / "pairs.jsonl", 40)
        for stage in ("sft", "kto", "pt"):
            save_pairs(folder / f"{stage}.jsonl", 40, stage=stage)
        settings = {
            "model_name_or_path": str(folder / "model"),
            "dataset": "pairs.jsonl",
            "dataset_dir": str(folder),
            "max_length": 64,
            "max_tokens_per_row": 128,
            "train_batch_size": 8,
            "max_steps": 12,
            "save_steps": 3,
            "learning_rate": 0.01,
            "precision": "fp32",
            "disable_tqdm": True,
            "cache_dir": str(folder / "cache"),
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))

    def zero(self, stage: int, offload: bool = False) -> str:
        """A DeepSpeed JSON."""
        return zero_json(self.folder, stage, offload)

    def start(self, out: str, *arguments: str, ranks: int = 2, **variables: str) -> Run:
        """`dsdpo train`, typed by a user."""
        line = [sys.executable, "-m", "dsdpo", *self._line(out, *arguments), "--num_accelerators", str(ranks)]
        return Run(line, self.folder / out, variables, self.folder / f"{Path(out).name}.log")

    def run(self, out: str, *arguments: str, ranks: int = 2, **variables: str) -> tuple[int, str]:
        """Exit code and output of a run that ends by itself."""
        return self.start(out, *arguments, ranks=ranks, **variables).wait()

    def run_ranks(self, out: str, *arguments: str, ranks: int = 2) -> tuple[int | None, str]:
        """As `run`, by ranks alone, which take a third of the time: for what is not about supervisor and launcher."""
        return run_as_ranks(ranks, *self._line(out, *arguments))

    def run_supervisor(self, out: str, *arguments: str, ranks: int = 2) -> tuple[int | None, str]:
        """As `run`, without a new interpreter: for what the supervisor says before it launches anything."""
        line = [*self._line(out, *arguments), "--num_accelerators", str(ranks)]
        [end] = run_commands((line, {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}))
        return end

    def _line(self, out: str, *arguments: str) -> list[str]:
        return ["train", str(self.folder / "run.yaml"), "--output_dir", str(self.folder / out), *arguments]


class Run:
    """A `dsdpo train` that is under way, in a session of its own, as from a terminal."""

    def __init__(self, line: list[str], out: Path, variables: dict[str, str], log: Path | None = None) -> None:
        self.out = out
        self._log = log or out.with_name(f"{out.name}.log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                line, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return self._log.read_text(errors="replace")

    def wait(self) -> tuple[int, str]:
        """Exit code and output."""
        code = self.process.wait(PATIENCE_S)
        return code, self.output

    def until(self, true: Callable[[], bool], what: str) -> bool:
        """Look until something is so; False if the run ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if self.process.poll() is not None:
                return bool(true())
            assert time.monotonic() < deadline, f"waited for {what}: {self.output[-3000:]}"
            time.sleep(0.02)
        return True

    def until_step(self, step: int) -> bool:
        """Look until a step is reported."""
        return self.until(lambda: steps_done(self.out) >= step, f"step {step}")

    def ranks(self) -> list[psutil.Process]:
        """Its processes that train, by rank."""
        ranks = []
        for process in processes_of(self.out):
            try:
                rank = process.environ().get("RANK")
                if rank is not None and process.ppid() != 1 and "launch" not in " ".join(process.cmdline()[:3]):
                    ranks.append((int(rank), process))
            except (psutil.Error, OSError):
                continue
        return [process for _, process in sorted(ranks, key=lambda pair: pair[0])]

    def launcher(self) -> psutil.Process:
        """The `deepspeed` launcher."""
        return next(p for p in psutil.Process(self.process.pid).children() if "deepspeed" in " ".join(p.cmdline()))

    def until_nobody_is_left(self) -> None:
        """Fail if a process of the run outlives it."""
        deadline = time.monotonic() + 120
        while left := processes_of(self.out):
            assert time.monotonic() < deadline, [p.cmdline() for p in left]
            time.sleep(0.1)


def processes_of(out: Path) -> list[psutil.Process]:
    """Processes whose command line names an output_dir."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(out) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def records(out: Path) -> list[dict[str, Any]]:
    """The steps that metrics.jsonl tells of; a line that is being written does not count."""
    lines = []
    path = out / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def steps_done(out: Path) -> int:
    return max((int(line["step"]) for line in records(out)), default=0)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in records(out)]


def weights(out: Path) -> dict[str, np.ndarray]:
    """The exported weights."""
    files = [*(out / "final").glob("*.safetensors")]
    return {key: value for file in files for key, value in safetensors.numpy.load_file(file).items()}


def same_weights(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same weights, to the bit."""
    one, other = weights(a), weights(b)
    return bool(one) and one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
