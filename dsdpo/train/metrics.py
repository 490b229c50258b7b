"""What a run reports: one reduced vector per step, metrics.jsonl, TensorBoard or wandb, and the progress bar."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm
from tqdm import tqdm

from dsdpo.config.schema import RunConfig
from dsdpo.objectives.preference import STATS


class StepVector:
    """Sums over a step's pairs on all ranks, reduced on the device and read when they are needed.

    Entries: the sums of STATS, the number of pairs, the number of losses that are not finite, the number of ranks
    that want to stop. The copy to the host runs beside the next step, so reading it one step late costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(STATS) + 3, dtype=torch.float64, device=device)
        self._host: torch.Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def add(self, stats: torch.Tensor, losses: torch.Tensor) -> None:
        """Add a row's pairs: stats [len(STATS), P], losses [P]."""
        self._sums[: len(STATS)] += stats.sum(dim=1)
        self._sums[-3] += losses.numel()
        self._sums[-2] += (~torch.isfinite(losses.detach())).sum()

    def reduce(self, stop: bool = False) -> None:
        """Sum over the ranks and start the copy to the host."""
        self._sums[-1] += float(stop)
        comm.all_reduce(self._sums)
        self._host = self._sums.to("cpu", non_blocking=True)
        if self._sums.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> tuple[dict[str, float], int, bool]:
        """Means of STATS over the pairs, the number of losses that are not finite, whether a rank wants to stop."""
        if self._ready is not None:
            self._ready.synchronize()
        assert self._host is not None, "reduce() comes before read()"
        *sums, pairs, bad, stop = self._host.tolist()
        return {name: value / max(pairs, 1) for name, value in zip(STATS, sums)}, int(bad), stop > 0


def memory_peak_gb(device: torch.device) -> float:
    """Most memory this rank has held, in GiB: of the GPU's allocator on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


class Reporter:
    """Writes metrics on the main rank; on the others every method does nothing.

    Args:
        config: the run.
        total_steps: length of the progress bar.
        is_main: whether this rank reports.
    """

    def __init__(self, config: RunConfig, total_steps: int, is_main: bool) -> None:
        self.config = config
        self.is_main = is_main
        self.total_steps = total_steps
        self._started = 0.0
        if not is_main:
            return
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = (folder / "metrics.jsonl").open("a", buffering=1)
        self._bar = tqdm(
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=config.disable_tqdm or not sys.stderr.isatty(),
        )
        self._tensorboard: Any = None
        self._wandb: Any = None
        if "tensorboard" in config.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if "wandb" in config.report_to:
            import wandb

            self._wandb = wandb.init(
                project="dsdpo",
                name=config.run_name or folder.name,
                dir=str(folder),
                config=config.model_dump(),
            )

    def start(self) -> None:
        """The steps begin: the time left is reckoned from here."""
        self._started = time.perf_counter()
        if self.is_main:
            self._bar.reset()

    def step(self, record: dict[str, float]) -> None:
        """One optimizer step: to metrics.jsonl always, elsewhere every logging_steps."""
        if not self.is_main:
            return
        self._jsonl.write(json.dumps(record) + "\n")
        step = int(record["step"])
        brief = {
            "loss": f"{record['loss']:.4f}",
            "acc": f"{record['rewards/accuracies']:.2f}",
            "margin": f"{record['rewards/margins']:.3f}",
            "tok/s": f"{record['logical_tokens_per_second']:.0f}",
        }
        self._bar.set_postfix(brief, refresh=False)
        self._bar.update(step - self._bar.n)
        if step % self.config.logging_steps and step != self.total_steps:
            return
        self._track(record, "train")
        if self._bar.disable:
            left = (time.perf_counter() - self._started) / step * (self.total_steps - step)
            words = "  ".join(f"{key} {value}" for key, value in brief.items())
            print(f"step {step}/{self.total_steps}  {words}  left {tqdm.format_interval(left)}", flush=True)

    def evaluation(self, step: int, means: dict[str, float]) -> None:
        """Means over the held-out pairs after `step` steps, as `eval_…`."""
        if not self.is_main:
            return
        record = {"step": float(step), **{f"eval_{name}": value for name, value in means.items()}}
        self._jsonl.write(json.dumps(record) + "\n")
        self._track(record, "eval")
        self.say(
            f"held-out after step {step}: loss {means['loss']:.4f}  accuracy {means['rewards/accuracies']:.3f}  "
            f"margin {means['rewards/margins']:.3f}"
        )

    def say(self, line: str) -> None:
        """A line for the reader, above the progress bar where there is one."""
        if self.is_main:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _track(self, record: dict[str, float], prefix: str) -> None:
        step = int(record["step"])
        values = {f"{prefix}/{key}": value for key, value in record.items() if key != "step"}
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        if not self.is_main:
            return
        self._bar.close()
        self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
