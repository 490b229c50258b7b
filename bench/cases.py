"""What is compared: one record per case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"
ZERO3 = ROOT / "ds_configs" / "zero3.json"


@dataclass(frozen=True)
class Pairs:
    """A set of preference pairs, as a run config names it.

    Attributes:
        dataset: name in dataset_info.json, or a file in `folder`.
        max_length: longest prompt + completion, in tokens, on both sides.
        options: further data options of the run config.
    """

    dataset: str
    folder: Path
    max_length: int
    options: tuple[tuple[str, Any], ...] = ()


Side = Literal["trl", "trl_best", "dsdpo", "dsdpo_equal"]


@dataclass(frozen=True)
class Case:
    """One comparison: both sides train the same model on the same pairs with the same hyperparameters.

    Attributes:
        reference: `live` computes the reference in every step, `cached` before the first one.
        ranks: 1, or more with ZeRO-3 on both sides.
        steps: optimizer steps of `batch` pairs in each run.
        target: the ratio of pairs/s that dsdpo claims to reach at least; None: no claim.
        device: `cpu` trains in fp32, `cuda` in bf16.
        zero3: partition even on one rank.
        trl_accumulation: micro-steps that TRL splits a step into, for what does not fit otherwise. dsdpo packs rows.
        sides: what runs. `trl` at its defaults; `trl_best` with Liger's kernels on GPUs and the largest micro-batch
            that fits, which is looked for; `dsdpo` at its defaults; `dsdpo_equal` with rows of as many pairs as `trl`
            has in a micro-batch, to compare memory.
    """

    name: str
    pairs: Pairs
    finetuning: Literal["lora", "qlora", "full"]
    reference: Literal["live", "cached"]
    ranks: int = 1
    steps: int = 8
    batch: int = 8
    target: float | None = None
    model: Path = SMOLLM2
    device: Literal["cpu", "cuda"] = "cpu"
    zero3: bool = False
    gradient_checkpointing: bool = False
    trl_accumulation: int = 1
    lora_rank: int = 16
    seed: int = 42
    sides: tuple[Side, ...] = ("trl", "dsdpo")

    @property
    def micro_pairs(self) -> int:
        """Pairs of a micro-batch of TRL at its defaults, on one rank."""
        return self.batch // self.ranks // self.trl_accumulation

    @property
    def learning_rate(self) -> float:
        """Constant; high enough that the loss leaves log 2 within a few steps."""
        return 2e-6 if self.finetuning == "full" else 1e-4

    @property
    def deepspeed(self) -> Path | None:
        """DeepSpeed JSON of both sides. Without one TRL runs without DeepSpeed, as it does best."""
        return ZERO3 if self.ranks > 1 or self.zero3 else None


SHARED = ROOT / ".." / "shared" / "data"
KEEP_START = ("truncation_mode", "keep_start")  # TRL's default
# Short answers behind long shared prompts; long answers; a prompt and an empty answer. The longest pair rules what TRL
# pads: at 512 its batch of 16 hh sequences outgrows 24 GiB of memory. Longer pairs are left out on both sides.
HH = Pairs("hh_harmless_base_test.jsonl.gz", SHARED, 320, (("max_refused", 0.4), ("truncation_mode", "refuse")))
LONG = Pairs("dpo_en_demo.json", SHARED, 512, (("max_refused", 0.5), KEEP_START))
SQL = Pairs("text_to_sql", ROOT / "data", 320, (KEEP_START,))

CPU_CASES = [
    Case("hh-lora-live", HH, "lora", "live", target=3.0),
    Case("hh-lora-cached", HH, "lora", "cached", target=4.5),
    Case("hh-full-live", HH, "full", "live", target=2.5),
    Case("hh-full-cached", HH, "full", "cached"),
    Case("demo-lora-live", LONG, "lora", "live", steps=5, target=1.5),
    Case("demo-lora-cached", LONG, "lora", "cached", steps=5, target=1.5),
    Case("demo-full-cached", LONG, "full", "cached", steps=5),
    Case("sql-lora-live", SQL, "lora", "live", steps=20),
    Case("sql-lora-cached", SQL, "lora", "cached", steps=20),
    Case("sql-full-cached", SQL, "full", "cached", steps=20),
    Case("hh-lora-cached-2ranks", HH, "lora", "cached", ranks=2),
    Case("hh-lora-live-2ranks", HH, "lora", "live", ranks=2),
    Case("hh-full-cached-2ranks", HH, "full", "cached", ranks=2),
    Case("sql-lora-cached-2ranks", SQL, "lora", "cached", ranks=2, steps=20),
]


def with_steps(case: Case, steps: int | None) -> Case:
    """The case with another number of steps; None leaves it."""
    return replace(case, steps=steps) if steps else case
