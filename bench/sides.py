"""Runs one side of a case in fresh processes and tells what it measured."""

from __future__ import annotations

import json
import math
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

import numpy as np
import psutil
import yaml

from bench.cases import ROOT, Case, Side
from bench.meter import RankMemory
from bench.settings import run_config, trl_job
from dsdpo.config.load import load
from dsdpo.data.example import Lengths
from dsdpo.data.order import step_example_ids
from dsdpo.data.prepare import prepare
from dsdpo.data.shards import PreparedSet
from dsdpo.errors import DsdpoError
from dsdpo.launch.deepspeed import KEEP_FREED_MEMORY, cores, end_session, free_port

Log = list[tuple[float, str]]  # lines with the second at which each came

_TRL_BEGINS = re.compile("bench: the first step begins")
_OUT_OF_MEMORY = re.compile("out of memory|OutOfMemory", re.IGNORECASE)
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
        start_seconds: from the command to the first step, without that pass.
        host_share: per optimizer step, of dsdpo on CUDA.
        micro_pairs: of a micro-batch of TRL.
    """

    side: Side
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory_gb: list[float] = field(default_factory=list)
    reference_seconds: float | None = None
    start_seconds: float | None = None
    host_share: list[float] = field(default_factory=list)
    micro_pairs: int | None = None
    failed: str | None = None


@dataclass
class Bench:
    """A case made ready: its pairs prepared and written in the order of the steps.

    Attributes:
        folder: everything that the case's runs write.
        lengths: prompt, chosen and rejected tokens of the pairs in step order, int64 [steps * batch, 3].
        timeout: seconds after which a run is ended.
        same_malloc: give TRL the allocator settings that dsdpo's supervisor gives its ranks.
        until: on time.monotonic(); a run that goes on then is ended.
    """

    case: Case
    folder: Path
    lengths: np.ndarray
    timeout: float
    same_malloc: bool
    until: float = math.inf
    _fits: int | None = field(init=False, default=None)

    def run(self, side: Side) -> Run:
        """One run in fresh processes; for `trl_best` the first time one more for each micro-batch that is too large."""
        if side in ("dsdpo", "dsdpo_equal"):
            return self._dsdpo(side)
        if side == "trl":
            return self._trl(side, self.case.micro_pairs)
        pairs = self._fits or self.case.batch // self.case.ranks
        while (run := self._trl(side, pairs)).failed and _OUT_OF_MEMORY.search(run.failed) and pairs > 1:
            pairs //= 2
        self._fits = pairs
        return run

    @property
    def equal_row_tokens(self) -> int:
        """Row length that holds as many pairs as TRL's micro-batch, whichever they are: of the longest ones. At least
        what dsdpo asks for: the two longest sequences."""
        tokens = np.sort(Lengths.from_table(self.lengths).packed(True))[::-1]
        return max(int(tokens[: self.case.micro_pairs].sum()), 2 * self.case.pairs.max_length)

    def _dsdpo(self, side: Side) -> Run:
        """The product as a user starts it; its numbers are those of metrics.jsonl."""
        output_dir = self.folder / "dsdpo"
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.rmtree(self.folder / "cache" / "reference", ignore_errors=True)
        command = [sys.executable, "-m", "dsdpo", "train", str(self.folder / "run.yaml")]
        command += ["--num_accelerators", str(self.case.ranks)]
        if side == "dsdpo_equal":
            recompute = "full" if self.case.gradient_checkpointing else "none"
            command += ["--max_tokens_per_row", str(self.equal_row_tokens), "--gradient_checkpointing", recompute]
        code, log, memory_gb = self._start(side, command, self._environment())
        if code:
            return Run(side, failed=_last_words(log))
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        if self.case.device == "cuda":
            memory_gb = [lines[-1]["memory_peak_gb"]]
        reference_seconds = _between(log, _FILLING, _FILLED)
        return Run(
            side,
            seconds=[line["step_time"] for line in lines],
            losses=[line["loss"] for line in lines],
            memory_gb=memory_gb,
            reference_seconds=reference_seconds,
            start_seconds=_start_seconds(log, _FILLED, reference_seconds),
            host_share=[line["host_share"] for line in lines if "host_share" in line],
        )

    def _trl(self, side: Side, pairs: int) -> Run:
        """TRL with micro-batches of `pairs`."""
        changes = {"accumulation": self.case.batch // self.case.ranks // pairs}
        changes["liger"] = side == "trl_best" and self.case.device == "cuda"
        job = self.folder / f"{side}.json"
        job.write_text(json.dumps(trl_job(self.case, self.folder) | changes))
        command = [sys.executable, "-m"]
        if self.case.deepspeed:
            command += ["deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
            command += ["--num_accelerators", str(self.case.ranks), "--master_port", str(free_port()), "--module"]
        command += ["bench.trl_run", str(job)]
        cache = self.folder / "hf_datasets"  # with TRL's reference log-probs
        shutil.rmtree(cache, ignore_errors=True)
        environment = self._environment() | {"HF_DATASETS_CACHE": str(cache)}
        if self.same_malloc:
            environment["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY
        result = self.folder / "trl-result.json"
        result.unlink(missing_ok=True)
        code, log, memory_gb = self._start(side, command, environment)
        if code or not result.exists():
            return Run(side, failed=_last_words(log), micro_pairs=pairs)
        told = json.loads(result.read_bytes())
        gpu_peak_gb = told.pop("gpu_peak_gb")
        return Run(
            side,
            memory_gb=memory_gb if gpu_peak_gb is None else [gpu_peak_gb],
            start_seconds=_start_seconds(log, _TRL_BEGINS, told["reference_seconds"]),
            micro_pairs=pairs,
            **told,
        )

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
        log: Log = [(time.monotonic(), "")]
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
        most = max(min(self.timeout, self.until - time.monotonic()), 0.0)
        watchdog = threading.Timer(most, _end, [process.pid])
        watchdog.start()
        try:
            with RankMemory(process.pid) as memory, (self.folder / f"{side}.log").open("w") as copy:
                for line in process.stdout or ():
                    log.append((time.monotonic(), line.rstrip()))
                    copy.write(line)
                    copy.flush()
                code = process.wait()
            if watchdog.finished.is_set():
                log.append((time.monotonic(), f"TimeoutError: took longer than {most:.0f} s"))
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
    return Bench(case, folder, pairs.lengths(ids).per_pair, timeout, same_malloc)


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


def _start_seconds(log: Log, begins: re.Pattern[str], reference_seconds: float | None) -> float | None:
    """Seconds from the command to the first step, without the pass over the reference."""
    at = next((at for at, line in log if begins.match(line)), None)
    return None if at is None else at - log[0][0] - (reference_seconds or 0.0)


def _last_words(log: Log) -> str:
    """What a failed run most likely died of: a rank that lost its peer only tells the outcome."""
    lines = [line.strip() for _, line in log if line.strip()]
    for start, line in enumerate(lines):
        if re.match(r"dsdpo \w+: \d+ problem", line):  # listed below it
            return " ".join(lines[start:])[:300]
    told = [line for line in lines if re.search(r"^dsdpo \w+:|Error\b.*: ", line) and "Connection" not in line]
    return (told or lines or ["no output"])[-1][:300]
