"""dsdpo beside TRL on GPUs: a model of Llama-2-7B's shape with random weights, pairs of stated lengths, bf16.

    python bench/cuda_7b.py [--cases '7b-lora-*'] [--gpus N] [--rounds 3] [--markdown]
    python bench/cuda_7b.py --quick            16 layers, two cases, at most 6 minutes on one H100
    python bench/cuda_7b.py --device cpu       a tiny model in fp32, to try the script itself: its numbers mean nothing

LoRA, QLoRA and full fine-tuning, cached and live reference, short, long and 8k-token pairs (CASES). One GPU without
ZeRO for adapters, ZeRO-3 for full fine-tuning and on several GPUs. TRL runs at its defaults, and at its best: Liger's
kernels and the largest micro-batch that fits, halved from the whole step until it does. Gradient checkpointing, which
is on in TRL's defaults and takes time, is off without --gradient_checkpointing. dsdpo runs at its defaults, and with
rows of as many pairs as TRL's micro-batch at its defaults, to compare the memory, then without recomputing too.

Told: pairs/s, dsdpo's over each of TRL's by round, logical and physical tokens/s, MFU by the formula in
dsdpo/plan/flops.py, the peak of the GPU's allocator on rank 0, the share of a step that the GPU may have waited for the
host, and seconds from the command to the first step. Model and pairs are made on the spot; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.against_trl import arguments, compare, end_runs_on_sigterm
from bench.cases import Case, Pairs, Side
from bench.models import BUILT_IN
from bench.report import Result, machine, table
from dsdpo.data.example import Lengths
from dsdpo.plan.flops import mfu, peak_tflops, step_flops
from dsdpo.plan.shape import ModelShape

COLUMNS = (
    "case",
    "side",
    "pairs/s",
    "dsdpo's ratio by round",
    "logical tokens/s",
    "physical tokens/s",
    "MFU",
    "pairs in a micro-batch",
    "peak GiB",
    "host share",
    "start s",
    "last loss",
)
LLAMA_2_7B = BUILT_IN["llama-2-7b"]
TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
QUICK_SECONDS = 330.0  # of which each case may take its share


@dataclass(frozen=True)
class PairLengths:
    """Mean tokens of prompt, chosen and rejected, and how many pairs a step and TRL's micro-batch have."""

    tokens: tuple[int, int, int]
    batch: int
    micro_pairs: int

    def on(self, gpus: int) -> PairLengths:
        """The same with the next larger step that is a whole number of TRL's micro-batches on each GPU."""
        once = gpus * self.micro_pairs
        return replace(self, batch=math.ceil(self.batch / once) * once)


@dataclass(frozen=True)
class CudaCase:
    """A row of the comparison; `lengths` names one of LENGTHS."""

    finetuning: Literal["lora", "qlora", "full"]
    reference: Literal["cached", "live"]
    lengths: str

    @property
    def name(self) -> str:
        """As --cases finds it."""
        return f"7b-{self.finetuning}-{self.reference}-{self.lengths}"


LENGTHS = {
    "short": PairLengths((128, 64, 64), batch=64, micro_pairs=16),
    "long": PairLengths((512, 256, 256), batch=16, micro_pairs=4),
    "8k": PairLengths((4096, 2048, 2048), batch=4, micro_pairs=1),
}
TINY_LENGTHS = {name: PairLengths((16, 8, 8), batch=4, micro_pairs=2) for name in LENGTHS}
CASES = [
    CudaCase("lora", "cached", "long"),
    CudaCase("full", "cached", "long"),
    CudaCase("lora", "live", "long"),
    CudaCase("full", "live", "long"),
    CudaCase("lora", "cached", "short"),
    CudaCase("full", "cached", "short"),
    CudaCase("lora", "cached", "8k"),
    CudaCase("full", "cached", "8k"),
    CudaCase("qlora", "cached", "long"),
    CudaCase("qlora", "live", "long"),
    CudaCase("qlora", "cached", "short"),
    CudaCase("qlora", "cached", "8k"),
]
QUICK_CASES = CASES[:2]


def make_model(folder: Path, config: LlamaConfig, device: str, dtype: torch.dtype) -> Path:
    """A Hugging Face folder with random weights and a tokenizer that knows a word per token id; kept between runs."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, config.vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def make_pairs(folder: Path, n: int, lengths: tuple[int, int, int], spread: float, vocab: int) -> Pairs:
    """n pairs of random words. Lengths are uniform within (1 +- spread) of the given ones; the end token adds one."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def text(mean: int) -> str:
        longest, shortest = round(mean * (1 + spread)), max(1, round(mean * (1 - spread)))
        return " ".join(f"w{i}" for i in rng.integers(3, vocab, size=rng.integers(shortest, longest + 1)))

    rows = [dict(zip(("prompt", "chosen", "rejected"), map(text, lengths))) for _ in range(n)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    longest = round((lengths[0] + max(lengths[1:])) * (1 + spread)) + 8
    return Pairs("pairs.jsonl", folder, longest, (("template", "none"),))


def case_of(row: CudaCase, asked: argparse.Namespace, lengths: PairLengths, pairs: Pairs, model: Path) -> Case:
    """What `compare` runs. On one GPU TRL does without ZeRO where an adapter alone is trained."""
    on_gpu = asked.device == "cuda"
    return Case(
        row.name,
        pairs,
        row.finetuning,
        row.reference,
        ranks=asked.gpus,
        steps=asked.steps,
        batch=lengths.batch,
        model=model,
        device=asked.device,
        zero3=on_gpu and row.finetuning == "full",
        gradient_checkpointing=asked.gradient_checkpointing,
        trl_accumulation=lengths.batch // asked.gpus // lengths.micro_pairs,
        sides=("dsdpo", "dsdpo_equal", "trl", "trl_best"),  # the search for the last one's micro-batch takes longest
    )


def rows(result: Result, config: LlamaConfig, lengths: np.ndarray, peak: float | None) -> list[list[str]]:
    """A row of COLUMNS per side.

    Args:
        lengths: of the run's pairs in step order, int [steps * batch, 3].
        peak: TFLOP/s of one GPU; None leaves MFU out.
    """
    case, told = result.case, []
    shape = ModelShape.from_config(config, 0 if case.finetuning == "full" else case.lora_rank)
    for side in case.sides:
        if why := result.failed(side):
            told.append([case.name, side, f"failed: {why}"] + ["-"] * (len(COLUMNS) - 3))
            continue
        logical, physical, shares = speeds(result, side, shape, lengths, peak)
        ratios = result.ratios(side) if side.startswith("trl") else []
        told.append(
            [
                case.name,
                side,
                f"{result.throughput(side):.2f}",
                " ".join(f"{ratio:.2f}" for ratio in ratios) or "-",
                f"{logical:.0f}",
                f"{physical:.0f}",
                f"{shares:.1%}" if peak else "-",
                _micro_batch(result, side),
                f"{result.memory(side):.1f}",
                "-" if (share := result.host_share(side)) is None else f"{share:.2f}",
                "-" if (start := result.start_seconds(side)) is None else f"{start:.1f}",
                f"{result.rounds[-1][side].losses[-1]:.4f}",
            ]
        )
    return told


def speeds(
    result: Result, side: Side, shape: ModelShape, lengths: np.ndarray, peak: float | None
) -> tuple[float, float, float]:
    """Logical and physical tokens/s and MFU, medians over the timed steps of all rounds."""
    case, found = result.case, []
    shared, live = side.startswith("dsdpo"), case.reference == "live"
    for runs in result.rounds:
        for step, seconds in list(enumerate(runs[side].seconds))[result.warmup :]:
            pairs = Lengths.from_table(lengths[step * case.batch : (step + 1) * case.batch])
            share = mfu(step_flops(shape, pairs, shared, live), seconds, case.ranks, peak or 1)
            found.append((pairs.padded / seconds, int(pairs.packed(shared).sum()) / seconds, share))
    logical, physical, shares = (statistics.median(values) for values in zip(*found))
    return logical, physical, shares


def _micro_batch(result: Result, side: Side) -> str:
    if side == "dsdpo_equal":
        return str(result.case.micro_pairs)
    pairs = result.rounds[-1][side].micro_pairs
    return "by tokens" if pairs is None else str(pairs)


def memory_verdict(result: Result, target: float = 0.6) -> str | None:
    """A sentence on the memory with equal pairs in a micro-batch."""
    ours, theirs = result.memory("dsdpo_equal"), result.memory("trl")
    if result.skipped or ours is None or theirs is None:
        return None
    word = "reached" if ours <= target * theirs else "MISSED"
    pairs = result.case.micro_pairs
    return f"{result.case.name}: {ours / theirs:.2f} of TRL's memory with {pairs} pairs each, target {target} {word}"


def options(line: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what follows from --quick and --device filled in."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", default="*", metavar="GLOB", help="names to run, such as `7b-lora-*` (all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a tiny model (cuda)")
    parser.add_argument("--quick", action="store_true", help="16 layers, LoRA and full, one round of 5 steps")
    parser.add_argument("--seconds", type=float, metavar="S", help="end then, with the numbers so far (--quick: 330)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs (all)")
    parser.add_argument("--spread", type=float, default=0.5, metavar="X", help="lengths vary by this share (0.5)")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers (32: 7B)")
    parser.add_argument("--peak_tflops", type=float, metavar="X", help="dense bf16 TFLOP/s of one GPU (by its name)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides")
    asked = parser.parse_args(line)
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("cuda_7b: needs an NVIDIA GPU that torch can use; there is none here. To try the script: --device cpu")
    asked.gpus = asked.gpus or (torch.cuda.device_count() if asked.device == "cuda" else 1)
    asked.layers = asked.layers or (16 if asked.quick else 32)
    asked.steps = asked.steps or (5 if asked.quick else 10)
    asked.rounds = 1 if asked.quick else asked.rounds
    asked.seconds = asked.seconds or (QUICK_SECONDS if asked.quick and asked.device == "cuda" else math.inf)
    if asked.steps <= asked.warmup:
        parser.error(f"--steps must exceed --warmup {asked.warmup}")
    return asked


def model_config(asked: argparse.Namespace) -> LlamaConfig:
    """Llama-2-7B's shape, or a tiny one, with positions for the longest pairs."""
    if asked.device == "cpu":
        return TINY
    LLAMA_2_7B.num_hidden_layers = asked.layers
    LLAMA_2_7B.max_position_embeddings = 16384
    return LLAMA_2_7B


def main(line: list[str] | None = None) -> None:
    """Make the model and the pairs, run, tell."""
    asked = options(line)
    began = time.monotonic()
    end_runs_on_sigterm()
    config, peak = model_config(asked), asked.peak_tflops
    if asked.device == "cuda":
        gpu = torch.cuda.get_device_name(0)
        peak = peak or peak_tflops(gpu)
        if peak is None:
            print(f"no peak is known for {gpu}: no MFU without --peak_tflops")
        print(f"GPUs: {asked.gpus} x {gpu}, peak {peak} TFLOP/s")
    print(*machine(), sep="\n", flush=True)
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    shape = "tiny" if asked.device == "cpu" else f"{asked.layers}-layers"
    model = make_model(asked.work / f"llama-{shape}", config, asked.device, dtype).resolve()
    if asked.device == "cuda":
        torch.cuda.empty_cache()
    results, told, globs = [], [], asked.cases.split(",")
    chosen = [c for c in (QUICK_CASES if asked.quick else CASES) if any(fnmatch(c.name, glob) for glob in globs)]
    for number, row in enumerate(chosen, 1):
        until = began + asked.seconds * number / len(chosen)
        lengths = (TINY_LENGTHS if asked.device == "cpu" else LENGTHS)[row.lengths].on(asked.gpus)
        folder = asked.work / f"pairs-{asked.device}-{row.lengths}"
        pairs = make_pairs(folder, lengths.batch * asked.steps, lengths.tokens, asked.spread, config.vocab_size)
        case = case_of(row, asked, lengths, pairs, model)
        result = compare(case, asked.rounds, asked.warmup, asked.work, asked.timeout, until=until)
        results.append(result)
        if not result.skipped:
            told += rows(result, config, np.array(result.lengths), peak)
        if asked.json:  # after every case: a long bench that is stopped has its numbers
            asked.json.write_text(json.dumps([result.record() for result in results], indent=1, default=str))
    print("\n" + table(told, COLUMNS, asked.markdown) + "\n")
    for result in results:
        print(*result.verdicts(), *filter(None, [memory_verdict(result)]), sep="\n")
    ours: list[Side] = ["dsdpo", "dsdpo_equal"]
    if not results or any(result.skipped or any(map(result.failed, ours)) for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
