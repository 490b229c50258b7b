"""What a run reports: one reduced vector per step, metrics.jsonl, trackers, and the progress bar."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed import comm
from tqdm import tqdm

from dsdpo.checkpoint.saver import SaveStatus
from dsdpo.config.schema import RunConfig
from dsdpo.config.trackers import named_trackers
from dsdpo.errors import IOFailure
from dsdpo.objectives.base import MicroBatchLoss
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir
from dsdpo.train.trackers import Trackers


@dataclass(frozen=True)
class StepTotals:
    """A step over all ranks.

    Attributes:
        means: metric -> mean over the examples.
        bad_losses: losses of examples that are not finite.
        grad_norm: of the step, as given to `reduce`.
        stop: whether a rank wants to stop.
        written: ranks that had written all of their part of the checkpoint in flight.
        failed: those that could not.
    """

    means: dict[str, float]
    bad_losses: int
    grad_norm: float
    stop: bool
    written: int
    failed: int


_COUNTERS = ("examples", "bad_losses", "stop", "written", "failed")


class MetricSums:
    """Sums over a step's examples on all ranks, reduced on the device and read when they are needed.

    Beside the metrics' sums there are counters: over the examples of the data-parallel ranks, how many they are and how
    many losses are not finite; over all ranks, how many want to stop, have written their part of a checkpoint, could
    not. The copy to the host runs beside the next step, so reading it one step late costs nothing.

    Args:
        metrics: names, as of `Objective.metrics`.
        device: where the losses are computed.

    Attributes:
        per_example: fp32 [E], the losses of each of this rank's micro-batches.
    """

    def __init__(self, metrics: Sequence[str], device: torch.device) -> None:
        self._metrics = metrics
        self._place = {name: len(metrics) + i for i, name in enumerate(_COUNTERS)}
        self._sums = torch.zeros(len(metrics) + len(_COUNTERS), dtype=torch.float64, device=device)
        self.per_example: list[torch.Tensor] = []
        self._host: torch.Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def _count(self, counter: str, number: float | torch.Tensor) -> None:
        self._sums[self._place[counter]] += number  # a number of the host is not copied: that would wait for the GPU

    def add(self, loss: MicroBatchLoss) -> None:
        """Add a micro-batch's examples."""
        self.per_example.append(loss.per_example)
        self._sums[: len(self._metrics)] += loss.metrics.sum(dim=1)
        self._count("examples", loss.per_example.numel())
        self._count("bad_losses", (~torch.isfinite(loss.per_example)).sum())

    def reduce(
        self,
        grad_norm: torch.Tensor | float = 0.0,
        stop: bool = False,
        save: SaveStatus = SaveStatus(),  # noqa: B008
    ) -> None:
        """Sum over the ranks, with what this one wants and has done, and start the copy to the host.

        Args:
            grad_norm: of the step, the same on all ranks. It travels along: reading it from the device by itself would
                wait for all that has been queued since.
        """
        for counter, flag in (("stop", stop), ("written", save.written), ("failed", save.failed)):
            self._count(counter, float(flag))
        comm.all_reduce(self._sums)
        norm = torch.zeros_like(self._sums[:1]) + grad_norm
        self._host = torch.cat([self._sums, norm]).to("cpu", non_blocking=True)
        if self._sums.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> StepTotals:
        """What it came to over all ranks."""
        if self._ready is not None:
            self._ready.synchronize()
        assert self._host is not None, "reduce() comes before read()"
        *sums, grad_norm = self._host.tolist()
        counts = {name: sums[place] for name, place in self._place.items()}
        return StepTotals(
            means={name: value / max(counts["examples"], 1) for name, value in zip(self._metrics, sums)},
            bad_losses=int(counts["bad_losses"]),
            grad_norm=grad_norm,
            stop=counts["stop"] > 0,
            written=int(counts["written"]),
            failed=int(counts["failed"]),
        )


def memory_peak_gb(device: torch.device) -> float:
    """Most memory this rank has held, in GiB: of the GPU's allocator on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


# metric -> its short name and format on the terminal; metrics that an objective does not have are left out
_BRIEF = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "rewards/accuracies": ("accuracy", ".3f"),
    "rewards/margins": ("margin", ".3f"),
}


def brief(record: Mapping[str, float]) -> dict[str, str]:
    """Loss, accuracy and margin as text, by their short names; those that a record has."""
    return {short: format(record[name], form) for name, (short, form) in _BRIEF.items() if name in record}


def _drop_after(path: Path, step: int) -> None:
    """Leave only the lines of a metrics file up to a step; of a line that a kill has cut short, nothing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


class Reporter:
    """Writes metrics on the main rank; on the others every method does nothing.

    Args:
        config: the run.
        total_steps: length of the progress bar.
        is_main: whether this rank reports.
        first_step: steps that were taken before. What an earlier process reported of later ones is dropped, as they
            are taken again. None: this process takes no steps, and leaves the reports as they are.
    """

    def __init__(self, config: RunConfig, total_steps: int, is_main: bool, first_step: int | None = 0) -> None:
        self.config = config
        self.is_main = is_main
        self.total_steps = total_steps
        self._first_step = first_step or 0
        self._started = 0.0
        if not is_main:
            return
        run_dir = RunDir(Path(config.output_dir))
        run_dir.path.mkdir(parents=True, exist_ok=True)
        if first_step is not None:
            _drop_after(run_dir.metrics, first_step)
        self._jsonl = run_dir.metrics.open("a", buffering=1)
        self._bar = tqdm(
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=config.disable_tqdm or not sys.stderr.isatty(),
        )
        names = named_trackers(config.report_to) if first_step is not None else []
        self._trackers = Trackers(config, names, self._first_step, self.say)

    def start(self) -> None:
        """The steps begin: the time left is reckoned from here."""
        self._started = time.perf_counter()
        if self.is_main:
            self._bar.reset()
            self._bar.update(self._first_step)

    def step(self, record: dict[str, float]) -> None:
        """One optimizer step: to metrics.jsonl always, elsewhere every logging_steps."""
        if not self.is_main:
            return
        self._write(record)
        step = int(record["step"])
        figures = brief(record) | {"tok/s": f"{record['logical_tokens_per_second']:.0f}"}
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(step - self._bar.n)
        if step % self.config.logging_steps and step != self.total_steps:
            return
        self._track(record, "train")
        if self._bar.disable:
            per_step = (time.perf_counter() - self._started) / (step - self._first_step)
            left = per_step * (self.total_steps - step)
            words = "  ".join(f"{key} {value}" for key, value in figures.items())
            print(f"step {step}/{self.total_steps}  {words}  left {tqdm.format_interval(left)}", flush=True)

    def evaluation(self, step: int, means: dict[str, float]) -> None:
        """Means over the held-out examples after `step` steps, as `eval_…`."""
        if not self.is_main:
            return
        record = {"step": float(step), **{f"eval_{name}": value for name, value in means.items()}}
        self._write(record)
        self._track(record, "eval")
        words = "  ".join(f"{key} {value}" for key, value in brief(means).items())
        self.say(f"held-out after step {step}: {words}")

    def has_evaluation(self, step: int) -> bool:
        """Whether one was reported after `step` steps; for the main rank, which has the file."""
        lines = Path(self._jsonl.name).read_text().splitlines()
        return any(record["step"] == step and "eval_loss" in record for record in map(json.loads, lines))

    def _write(self, record: dict[str, float]) -> None:
        """A line of metrics.jsonl. Raises IOFailure."""
        try:
            self._jsonl.write(json.dumps(record) + "\n")
        except OSError as error:
            raise IOFailure(
                f"cannot write {self._jsonl.name}: {error.strerror or error}; free space, and the same command goes on "
                "from the newest checkpoint"
            ) from error

    def say(self, line: str) -> None:
        """A line for the reader, above the progress bar where there is one."""
        if self.is_main:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _track(self, record: dict[str, float], prefix: str) -> None:
        step = int(record["step"])
        values = {f"{prefix}/{key}": value for key, value in record.items() if key != "step"}
        self._trackers.log(values, step)

    def close(self) -> None:
        """Flush and close everything."""
        if not self.is_main:
            return
        self._bar.close()
        self._jsonl.close()
        self._trackers.close()
