"""Numbers of all runs -> what a reader wants to know."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import ROOT, Case, Side
from bench.sides import Run
from dsdpo import __version__
from dsdpo.launch.deepspeed import cores

MEMORY_TARGET = 0.7
_PACKAGES = ("torch", "trl", "transformers", "peft", "deepspeed")
COLUMNS = (
    "case",
    "tokens p/c/r",
    "TRL pairs/s",
    "dsdpo pairs/s",
    "ratio (min to max)",
    "target",
    "TRL GiB",
    "dsdpo GiB",
    "memory ratio",
    "TRL ref. s",
    "dsdpo ref. s",
    "loss TRL",
    "loss dsdpo",
    "largest difference",
)


@dataclass
class Result:
    """All runs of one case: round by round, one of each side.

    Attributes:
        lengths: prompt, chosen and rejected tokens of the trained pairs, in the order of the steps.
        skipped: why the case did not run at all.
        warmup: steps at the start of each run that are not timed.
    """

    case: Case
    warmup: int
    lengths: list[list[int]] = field(default_factory=list)
    rounds: list[dict[Side, Run]] = field(default_factory=list)
    skipped: str | None = None

    def failed(self, side: Side) -> str | None:
        """Why a side has no numbers; the first failure counts."""
        if side not in self.case.sides:
            return "not run"
        return next((run.failed for runs in self.rounds if (run := runs[side]).failed), None)

    def pairs_per_second(self, run: Run) -> float:
        """Median over the timed steps."""
        return statistics.median(self.case.batch / seconds for seconds in run.seconds[self.warmup :])

    def throughput(self, side: Side) -> float | None:
        """Median over the rounds."""
        return None if self.failed(side) else statistics.median(self.pairs_per_second(r[side]) for r in self.rounds)

    def ratios(self, over: Side = "trl") -> list[float]:
        """dsdpo's pairs/s over TRL's, of each round; empty when a side failed."""
        if self.skipped or self.failed(over) or self.failed("dsdpo"):
            return []
        return [self.pairs_per_second(r["dsdpo"]) / self.pairs_per_second(r[over]) for r in self.rounds]

    def memory(self, side: Side) -> float | None:
        """GiB, sum over the ranks, median over the rounds."""
        return None if self.failed(side) else statistics.median(sum(r[side].memory_gb) for r in self.rounds)

    def reference_seconds(self, side: Side) -> float | None:
        """Median over the rounds of the pass that fills a cached reference."""
        seconds = [s for r in self.rounds if (s := r[side].reference_seconds) is not None]
        return statistics.median(seconds) if seconds else None

    def start_seconds(self, side: Side) -> float | None:
        """Smallest of the rounds: the first finds cold caches."""
        return min((s for r in self.rounds if (s := r[side].start_seconds) is not None), default=None)

    def host_share(self, side: Side) -> float | None:
        """Median over the timed steps of all rounds; None without a GPU."""
        shares = [share for r in self.rounds for share in r[side].host_share[self.warmup :]]
        return statistics.median(shares) if shares else None

    def loss_difference(self) -> float | None:
        """Largest absolute difference of the two losses over the steps of all rounds."""
        if not self.ratios():
            return None
        return max(abs(a - b) for r in self.rounds for a, b in zip(r["trl"].losses, r["dsdpo"].losses))

    def cells(self) -> list[str]:
        """One row of COLUMNS."""
        ratios, trl, ours = self.ratios(), self.memory("trl"), self.memory("dsdpo")
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
        last = [r.losses[-1] if (r := self.rounds[-1][side]).losses else None for side in ("trl", "dsdpo")]
        return [
            self.case.name,
            "/".join(f"{statistics.mean(side):.0f}" for side in zip(*self.lengths)),
            _number(self.throughput("trl"), 3),
            _number(self.throughput("dsdpo"), 3),
            ratio,
            f"{self.case.target:.1f}" if self.case.target else "-",
            _number(trl, 2),
            _number(ours, 2),
            _number(ours / trl if trl and ours else None, 2),
            _number(self.reference_seconds("trl"), 1),
            _number(self.reference_seconds("dsdpo"), 1),
            _number(last[0], 6),
            _number(last[1], 6),
            _number(self.loss_difference(), 7),
        ]

    def verdicts(self) -> list[str]:
        """Sentences on what was claimed, and on what went wrong."""
        name = self.case.name
        if self.skipped:
            return [f"{name}: skipped: {self.skipped}"]
        told = [f"{name}: {side} failed: {why}" for side in self.case.sides if (why := self.failed(side))]
        if not (ratios := self.ratios()):
            return told
        difference, ratio = self.loss_difference() or 0.0, statistics.median(ratios)
        tolerance = loss_tolerance(self.case)
        word = "agree" if difference <= tolerance else "DIFFER"
        told.append(f"{name}: losses {word}: at most {difference:.1e} apart (tolerance {tolerance:.0e})")
        if self.case.target:
            word = "reached" if ratio >= self.case.target else "MISSED"
            told.append(f"{name}: {ratio:.2f} times TRL's pairs/s, target {self.case.target:.1f} {word}")
            memory = (self.memory("dsdpo") or 0.0) / (self.memory("trl") or math.inf)
            word = "reached" if memory <= MEMORY_TARGET else "MISSED"
            told.append(f"{name}: {memory:.2f} of TRL's memory, target {MEMORY_TARGET} {word}")
        return told

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "case": asdict(self.case),
            "warmup": self.warmup,
            "lengths": self.lengths,
            "skipped": self.skipped,
            "rounds": [{side: asdict(run) for side, run in runs.items()} for runs in self.rounds],
            "ratios": self.ratios(),
            "ratios_to_best": self.ratios("trl_best"),
            "loss_difference": self.loss_difference(),
        }


def loss_tolerance(case: Case) -> float:
    """What counts as the same loss: fp32 sums of some hundred log-probs, in another order; bf16 is coarse."""
    return 1e-3 if case.device == "cpu" else 5e-2


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def machine() -> list[str]:
    """Machine, versions and command, a line each."""
    import torch

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return [
        f"machine: {cpu}, {cores()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
        + (f"; {len(gpus)} x {gpus[0]}" if gpus else ""),
        f"versions: dsdpo {__version__} ({commit or 'no git'}), {versions}, Python {platform.python_version()}",
        f"load average before: {os.getloadavg()[0]:.2f}"
        + (" (NOT A QUIET MACHINE)" if os.getloadavg()[0] > 0.5 else ""),
        f"command: python {shlex.join(sys.argv)}",
    ]


def table(rows: list[list[str]], columns: tuple[str, ...] = COLUMNS, markdown: bool = False) -> str:
    """Rows under column names, in columns of equal width or as Markdown."""
    if markdown:
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in (columns, *rows))
