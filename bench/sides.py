"""Runs one side of a case in fresh processes and tells what it measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import yaml

from bench.cases import ROOT, Case
from bench.meter import RankMemory
from dsdpo.config.load import load
from dsdpo.data.order import step_example_ids
from dsdpo.data.prepare import prepare
from dsdpo.data.shards import PreparedSet
from dsdpo.errors import DsdpoError
from dsdpo.launch.deepspeed import KEEP_FREED_MEMORY, cores, end_session, free_port

Side = Literal["trl", "dsdpo"]
Log = list[tuple[float, str]]  # lines with the second at which each came

_BETA = 0.1
# What dsdpo says when its reference pass begins, and when it has what the run needs.
_FILLING, _FILLED = re.compile(r"reference: computing \d+"), re.compile(r"\d+ examples, \d+ steps of \d+")


class BenchError(Exception):
    """A case cannot run here; the message says why."""


@dataclass
class Run:
    """What one side measured in one run; `failed` says why there is nothing.

    Attributes:
        seconds, losses: per optimizer step.
        memory_gb: peak resident memory per rank (CPU), or rank 0's peak of the GPU's allocator (CUDA), in GiB.
        reference_seconds: of the pass before the first step, for a cached reference.
    """

    side: Side
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory_gb: list[float] = field(default_factory=list)
    reference_seconds: float | None = None
    failed: str | None = None


@dataclass
class Bench:
    """A case made ready: its pairs prepared and written in the order of the steps.

    Attributes:
        folder: everything that the case's runs write.
        lengths: prompt, chosen and rejected tokens of the pairs in step order, int64 [steps * batch, 3].
        timeout: seconds after which a run is ended.
        same_malloc: give TRL the allocator settings that dsdpo's supervisor gives its ranks.
    """

    case: Case
    folder: Path
    lengths: np.ndarray
    timeout: float
    same_malloc: bool

    def run(self, side: Side) -> Run:
        """One run in fresh processes."""
        return self._dsdpo() if side == "dsdpo" else self._trl()

    def _dsdpo(self) -> Run:
        """The product as a user starts it; its numbers are those of metrics.jsonl."""
        output_dir = self.folder / "dsdpo"
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.rmtree(self.folder / "cache" / "reference", ignore_errors=True)
        command = [sys.executable, "-m", "dsdpo", "train", str(self.folder / "run.yaml")]
        command += ["--num_accelerators", str(self.case.ranks)]
        code, log, memory_gb = self._start("dsdpo", command, self._environment())
        if code:
            return Run("dsdpo", failed=_last_words(log))
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        if self.case.device == "cuda":
            memory_gb = [lines[-1]["memory_peak_gb"]]
        return Run(
            "dsdpo",
            seconds=[line["step_time"] for line in lines],
            losses=[line["loss"] for line in lines],
            memory_gb=memory_gb,
            reference_seconds=_between(log, _FILLING, _FILLED),
        )

    def _trl(self) -> Run:
        command = [sys.executable, "-m"]
        if self.case.deepspeed:
            command += ["deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
            command += ["--num_accelerators", str(self.case.ranks), "--master_port", str(free_port()), "--module"]
        command += ["bench.trl_run", str(self.folder / "trl.json")]
        cache = self.folder / "hf_datasets"  # with TRL's reference log-probs
        shutil.rmtree(cache, ignore_errors=True)
        environment = self._environment() | {"HF_DATASETS_CACHE": str(cache)}
        if self.same_malloc:
            environment["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY
        result = self.folder / "trl-result.json"
        result.unlink(missing_ok=True)
        code, log, memory_gb = self._start("trl", command, environment)
        if code or not result.exists():
            return Run("trl", failed=_last_words(log))
        told = json.loads(result.read_bytes())
        gpu_peak_gb = told.pop("gpu_peak_gb")
        return Run("trl", memory_gb=memory_gb if gpu_peak_gb is None else [gpu_peak_gb], **told)

    def _environment(self) -> dict[str, str]:
        """The same for both sides: this checkout, no hub, all cores shared out among the ranks."""
        result = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.case.device == "cpu":
            result |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, cores() // self.case.ranks))}
        return result

    def _start(self, side: Side, command: list[str], environment: dict[str, str]) -> tuple[int, Log, list[float]]:
        """Exit code, output and GiB per rank."""
        log: Log = []
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # Not its process group alone: dsdpo's supervisor starts the launcher in a session of its own.
        watchdog = threading.Timer(self.timeout, _end, [process.pid])
        watchdog.start()
        try:
            with RankMemory(process.pid) as memory, (self.folder / f"{side}.log").open("w") as copy:
                for line in process.stdout or ():
                    log.append((time.monotonic(), line.rstrip()))
                    copy.write(line)
                    copy.flush()
                code = process.wait()
            if watchdog.finished.is_set():
                log.append((time.monotonic(), f"TimeoutError: took longer than --timeout {self.timeout:.0f}"))
            elif code < 0:
                peak = f"{sum(memory.gb):.1f} GiB"
                log.append((time.monotonic(), f"ChildProcessError: killed by signal {-code} at {peak}: out of memory?"))
        finally:
            watchdog.cancel()
            _end(process.pid)
        return code, log, memory.gb


def make_ready(case: Case, work: Path, timeout: float, same_malloc: bool) -> Bench:
    """Prepare the pairs with dsdpo, write both sides' settings into work/<case>.

    Raises:
        BenchError: the data or the model are not here.
    """
    folder = (work / case.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    known = case.pairs.folder / case.pairs.dataset
    if not known.exists() and not (case.pairs.folder / "dataset_info.json").exists():
        raise BenchError(f"needs {case.pairs.dataset}, which is not part of the repository, in ../shared/data")
    if not (case.model / "config.json").exists():
        raise BenchError(f"there is no model in {os.path.relpath(case.model, ROOT)}; run demo/fetch_model.py")
    (folder / "run.yaml").write_text(yaml.safe_dump(run_config(case, folder), sort_keys=False))
    pairs = _prepared(case, folder)
    ids = np.concatenate([step_example_ids(step, len(pairs), case.batch, case.seed) for step in range(case.steps)])
    if len(ids) < case.steps * case.batch:
        raise BenchError(f"{len(pairs)} pairs are no whole steps of {case.batch}: take fewer steps")
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    examples = [pairs.example(int(i)) for i in ids]
    rows = [dict(zip(keys, (part.tolist() for part in (e.prompt_ids, *e.completion_ids)))) for e in examples]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "trl.json").write_text(json.dumps(trl_job(case, folder)))
    return Bench(case, folder, pairs.lengths(ids).per_pair, timeout, same_malloc)


def run_config(case: Case, folder: Path) -> dict[str, Any]:
    """dsdpo's run config of a case."""
    settings: dict[str, Any] = {
        "model_name_or_path": str(case.model),
        "finetuning_type": case.finetuning,
        "gradient_checkpointing": case.gradient_checkpointing,
        "dataset": case.pairs.dataset,
        "dataset_dir": str(case.pairs.folder.resolve()),
        "max_length": case.pairs.max_length,
        **dict(case.pairs.options),
        "cache_dir": str(folder / "cache"),
        "beta": _BETA,
        "reference": case.reference,
        "train_batch_size": case.batch,
        "max_steps": case.steps,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": case.seed,
        "output_dir": str(folder / "dsdpo"),
        "disable_tqdm": True,
    }
    if case.finetuning == "lora":
        settings["lora_rank"] = case.lora_rank
    if case.deepspeed:
        settings["deepspeed"] = str(case.deepspeed)
    return settings


def trl_job(case: Case, folder: Path) -> dict[str, Any]:
    """What `bench/trl_run.py` reads; the DeepSpeed JSON with the batch keys that transformers fills in."""
    deepspeed = None
    if case.deepspeed:
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        deepspeed = {
            **json.loads(case.deepspeed.read_bytes()),
            **dict.fromkeys((*auto, "gradient_clipping"), "auto"),
            "bf16": {"enabled": "auto"},
            "steps_per_print": 2**31 - 1,
        }
    return {
        "model": str(case.model),
        "pairs": str(folder / "pairs.jsonl"),
        "result": str(folder / "trl-result.json"),
        "output_dir": str(folder / "trl"),
        "finetuning": case.finetuning,
        "reference": case.reference,
        "lora_rank": case.lora_rank,
        "gradient_checkpointing": case.gradient_checkpointing,
        "max_length": case.pairs.max_length,
        "batch": case.batch,
        "accumulation": case.trl_accumulation,
        "steps": case.steps,
        "learning_rate": case.learning_rate,
        "beta": _BETA,
        "seed": case.seed,
        "device": case.device,
        "deepspeed": deepspeed,
    }


def _prepared(case: Case, folder: Path) -> PreparedSet:
    """The set that dsdpo's run will open, in this process: what is prepared does not depend on the reference."""
    loaded = load(folder / "run.yaml")
    if loaded.config is None:
        raise BenchError("; ".join(map(str, loaded.problems)))
    try:
        pairs = prepare(loaded.config, "train")
    except DsdpoError as error:
        raise BenchError(str(error)) from error
    assert pairs is not None
    return pairs


def _end(root: int) -> None:
    """Kill a command and all that it started, if any of it still runs: its process group, and what left that group."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(root)
        for child in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    end_session(root)


def _between(log: Log, first: re.Pattern[str], last: re.Pattern[str]) -> float | None:
    """Seconds from the first line that matches one pattern to the first that matches the other."""
    begin = next((at for at, line in log if first.match(line)), None)
    end = next((at for at, line in log if last.match(line)), None)
    return None if begin is None or end is None else end - begin


def _last_words(log: Log) -> str:
    """What a failed run most likely died of: a rank that lost its peer only tells the outcome."""
    lines = [line.strip() for _, line in log if line.strip()]
    for start, line in enumerate(lines):
        if re.match(r"dsdpo \w+: \d+ problem", line):  # listed below it
            return " ".join(lines[start:])[:300]
    told = [line for line in lines if re.search(r"^dsdpo \w+:|Error\b.*: ", line) and "Connection" not in line]
    return (told or lines or ["no output"])[-1][:300]
