"""What `make pipeline` does: plain text, supervised training, a reward model and DPO, one after another.

    python demo/pipeline.py [--num_accelerators N] [--rows N] [--heldout M] [--model MODEL] [--folder FOLDER]

Each stage is a config of configs/pipeline/ and takes the model of the stage before. The table at the end says what each
changed on held-out data about other tables, with the standard error of the change over its examples.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.fetch_model import FetchError, fetch_model  # noqa: E402
from demo.pipeline_data import write  # noqa: E402
from demo.run import dsdpo, gpus, heading  # noqa: E402

MODEL = Path(".cache/SmolLM2-135M-Instruct")
FOLDER = Path("outputs/pipeline")


@dataclass(frozen=True)
class Gain:
    """What a stage changed.

    Attributes:
        figure: its name.
        before, after: its value.
        gain: by how much it is better, a mean over examples.
        error: the standard error of that mean.
    """

    figure: str
    before: float
    after: float
    gain: float
    error: float

    def __str__(self) -> str:
        errors = self.gain / self.error if self.error else math.inf
        change = f"{self.gain:+.3f} +- {self.error:.3f} ({errors:.1f} standard errors)"
        return f"{self.figure:34} {self.before:10.3f} {self.after:10.3f}   {change}"


def examples(run: Path, key: str) -> list[float]:
    """A metric of each held-out example, of the last evaluation of a run."""
    return [json.loads(line)[key] for line in (run / "eval_examples.jsonl").read_text().splitlines()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def error_of(values: list[float]) -> float:
    """Standard error of the mean."""
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def loss_gain(figure: str, before: list[float], after: list[float], shown: Callable[[float], float]) -> Gain:
    """The fall of a loss, example by example; shown: of a mean loss."""
    falls = [one - other for one, other in zip(before, after, strict=True)]
    return Gain(figure, shown(mean(before)), shown(mean(after)), mean(falls), error_of(falls))


def accuracy_gain(figure: str, right: list[float]) -> Gain:
    """A share of pairs above one half, which is what a guess gets right."""
    return Gain(figure, 0.5, mean(right), mean(right) - 0.5, error_of(right))


def evaluated(stage: str, model: Path, key: str) -> list[float]:
    """A metric of each held-out example of a stage under other weights."""
    run = FOLDER / f"{stage}-before"
    config = f"configs/pipeline/{stage}.yaml"
    dsdpo("eval", config, "--model", str(model), "--model_name_or_path", str(model), "--output_dir", str(run))
    return examples(run, key)


def train(stage: str, ranks: int, *more: str) -> list[float]:
    """Train a stage and evaluate it: its loss for each held-out example, or whether the pair is in order."""
    config, run = f"configs/pipeline/{stage}.yaml", FOLDER / stage
    dsdpo("train", config, "--num_accelerators", str(ranks), *more)
    dsdpo("eval", str(run))
    return examples(run / "evaluation", "loss" if stage in ("pt", "sft") else "rewards/accuracies")


def main() -> None:
    """Fetch, make the data, train the four stages, tell what each changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_accelerators", type=int, help="ranks (all GPUs, or 2 on a CPU)")
    parser.add_argument("--rows", type=int, default=240, help="records of each file to train on")
    parser.add_argument("--heldout", type=int, default=120, help="held-out records of each file")
    parser.add_argument("--model", type=Path, help="to begin with (SmolLM2-135M-Instruct)")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where outputs/ is written; it has configs/, too")
    options = parser.parse_args()
    os.chdir(options.folder)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    start = time.monotonic()
    model = options.model or MODEL
    if options.model is None:
        heading("the model")
        try:
            print(fetch_model(MODEL, ROOT / ".cache"), flush=True)
        except FetchError as error:
            sys.exit(f"pipeline: {error}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    write(FOLDER / "data", options.rows, options.heldout)
    ranks = options.num_accelerators or gpus() or 2

    gains = []
    heading("stage 1 of 4: plain text")
    before = evaluated("pt", model, "loss")
    after = train("pt", ranks, "--model_name_or_path", str(model))
    gains.append(loss_gain("pt: perplexity (gain: log)", before, after, math.exp))
    heading("stage 2 of 4: supervised training")
    before = evaluated("sft", FOLDER / "pt" / "final", "loss")
    gains.append(loss_gain("sft: loss", before, train("sft", ranks), float))
    heading("stage 3 of 4: a reward model")
    gains.append(accuracy_gain("rm: accuracy (a guess: 0.5)", train("rm", ranks)))
    heading("stage 4 of 4: DPO")
    gains.append(accuracy_gain("dpo: reward accuracy (a guess: 0.5)", train("dpo", ranks)))

    heading(f"what each stage changed on {options.heldout} held-out records")
    print(f"{'':34} {'before':>10} {'after':>10}   gain")
    print("\n".join(map(str, gains)))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"\nThe pipeline took {minutes} min {seconds} s on {ranks} ranks.")
    if short := [gain.figure for gain in gains if gain.gain <= 2 * gain.error]:
        sys.exit(f"pipeline: no gain above two standard errors: {', '.join(short)}")


if __name__ == "__main__":
    main()
