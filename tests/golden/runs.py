"""Trains golden runs with the code of a commit or of the working tree, through the command line alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.golden.cases import CASES, COMMON, HELD_OUT, PAIRS, SAVED_STEP, Case
from tests.golden.inputs import save_model, save_pairs, save_tokenizer, zero_json

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "golden"
TIMEOUT_S, TIMED_OUT = 900, 124
LOG_END = 4000  # characters of a failed run's log that are shown
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "trl", "numpy", "safetensors", "tokenizers", "accelerate")
_RESULTS = ("metrics.jsonl", "final", "checkpoints")  # of an output_dir


class RunFailed(RuntimeError):
    """A run ended with an error; the message has the end of its log."""


def resolve(commit: str) -> str | None:
    """The full hash of a commit, or None where the history does not have it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def extract_package(commit: str, folder: Path) -> Path:
    """The package of a commit in `folder`, which then serves as PYTHONPATH."""
    archive = folder.with_suffix(".tar")
    folder.mkdir(parents=True)
    subprocess.run(["git", "-C", str(ROOT), "archive", "--format=tar", "-o", archive, commit, "dsdpo"], check=True)
    shutil.unpack_archive(archive, folder)
    return folder


def own_kernels(code: Path) -> dict[str, Any]:
    """The option that lets transformers and PEFT compute, as they did before there was one; empty before."""
    schema = code / "dsdpo" / "config" / "schema.py"
    return {"kernels": "none"} if "\n    kernels: " in schema.read_text() else {}


def save_inputs(folder: Path) -> None:
    """model/, pairs.jsonl, held_out.jsonl and a DeepSpeed JSON for each stage, in a new folder."""
    save_model(folder / "model")
    save_tokenizer(folder / "model")
    save_pairs(folder / "pairs.jsonl", PAIRS)
    save_pairs(folder / "held_out.jsonl", HELD_OUT, seed=1)
    for stage in (1, 2, 3):
        (folder / f"zero{stage}.json").write_text(zero_json(stage))


def environment(code: Path) -> dict[str, str]:
    """For a run on the CPU with the package in `code`: one thread per rank, the interpreter's own scripts first."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"PYTHONPATH": str(code), "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**inherited, **own, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def train(code: Path, run: Path, ranks: int, log: Path, *arguments: str, cwd: Path) -> int:
    """`dsdpo train run --num_accelerators ranks arguments…`; its output goes to `log`.

    Returns the exit code: TIMED_OUT for a run that was killed after TIMEOUT_S.
    """
    command = [sys.executable, "-m", "dsdpo", "train", str(run), "--num_accelerators", str(ranks), *arguments]
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        try:
            return subprocess.run(command, cwd=cwd, env=environment(code), **streams, timeout=TIMEOUT_S).returncode
        except subprocess.TimeoutExpired:
            return TIMED_OUT


@dataclass(frozen=True)
class Side:
    """Runs with one version of the package.

    Attributes:
        name: for messages.
        code: folder that holds the package.
        inputs: as `save_inputs` writes them.
        folder: for the runs.
        cache: where results are kept from one comparison to the next; None keeps none.
        options: of the run config, beside those of the case.
    """

    name: str
    code: Path
    inputs: Path
    folder: Path
    cache: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def check_package(self) -> None:
        """Raises RunFailed where an interpreter of this side would import another dsdpo."""
        command = [sys.executable, "-c", "import dsdpo; print(dsdpo.__file__)"]
        done = subprocess.run(command, cwd=self.code, env=environment(self.code), capture_output=True, text=True)
        if Path(done.stdout.strip() or "/").parent != self.code / "dsdpo":
            raise RunFailed(f"{self.name}: dsdpo comes from {done.stdout.strip()}, not from {self.code}\n{done.stderr}")

    def result(self, case: Case) -> Path:
        """The output_dir of a case, or the part of it that is compared; trained where it is not there yet."""
        out = self.folder / case.name / "out"
        if out.exists():
            return out
        kept = self.cache and self.cache / f"{case.name}-{self._key(case)[:16]}"
        if kept and kept.exists():
            return kept
        self._train(case, out)
        return _keep(out, kept) if kept else out

    def _key(self, case: Case) -> str:
        own = [self.options] if self.options else []
        return _digest(_settings(case), _content(self.inputs), *own)

    def _train(self, case: Case, out: Path) -> None:
        """Raises RunFailed."""
        place = out.parent
        place.mkdir(parents=True, exist_ok=True)
        paths = {
            "model_name_or_path": str(self.inputs / "model"),
            "dataset_dir": str(self.inputs),
            "dataset": "pairs.jsonl",
            "deepspeed": str(self.inputs / f"zero{case.zero}.json") if case.zero else None,
            "cache_dir": str(place / "cache"),
            "output_dir": str(out),
        }
        if case.resumes:
            source = self.result(next(other for other in CASES if other.name == case.resumes))
            paths["resume_from_checkpoint"] = str(source / "checkpoints" / f"step-{SAVED_STEP:08d}")
        (place / "run.yaml").write_text(yaml.safe_dump({**COMMON, **case.options, **self.options, **paths}))
        code = train(self.code, place / "run.yaml", case.ranks, place / "log", cwd=self.code)
        if code:
            end = (place / "log").read_text(errors="replace")[-LOG_END:]
            raise RunFailed(f"{self.name}: the run {case.name} ended with exit code {code}:\n{end}")


def base_cache(commit: str) -> Path:
    """Where the results of a commit are kept: they hold for this machine and these packages only."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return CACHE / f"{commit[:12]}-{_digest(_cpu(), platform.python_version(), versions)[:12]}"


def _cpu() -> list[str]:
    """Model and instruction sets: kernels are chosen by them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}) or lines


def _settings(case: Case) -> list[object]:
    source = [_settings(other) for other in CASES if other.name == case.resumes]
    return [COMMON, SAVED_STEP, {**asdict(case), "name": None}, source]


def _content(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _keep(out: Path, kept: Path) -> Path:
    """Copy results into the cache, where they appear by rename."""
    staged = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    staged.mkdir(parents=True)
    for name in _RESULTS:
        source = out / name
        if source.is_dir():
            shutil.copytree(source, staged / name)
        elif source.exists():
            shutil.copy2(source, staged / name)
    staged.rename(kept)
    return kept
