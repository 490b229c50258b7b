"""dsdpo beside TRL on GPUs: a model of Llama-2-7B's shape with random weights, pairs of stated lengths, bf16.

    python bench/cuda_7b.py [--prompt 512 --chosen 256 --rejected 256] [--gpus N] [--rounds 3] [--markdown]

LoRA and full fine-tuning, live and cached reference; one GPU without ZeRO for LoRA, ZeRO-3 for full fine-tuning and on
several GPUs. Told: pairs/s, logical and physical tokens/s, MFU by the formula in dsdpo/plan/flops.py, and the peak of
the GPU's allocator on rank 0. Model and pairs are made on the spot; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.against_trl import arguments, compare, end_runs_on_sigterm
from bench.cases import Case, Pairs
from bench.models import BUILT_IN
from bench.report import Result, machine, table
from bench.sides import Side
from dsdpo.data.example import Lengths
from dsdpo.plan.flops import mfu, peak_tflops, step_flops
from dsdpo.plan.shape import ModelShape

COLUMNS = ("case", "side", "pairs/s", "logical tokens/s", "physical tokens/s", "MFU", "peak GiB", "last loss")
LLAMA_2_7B = BUILT_IN["llama-2-7b"]


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


def cases(asked: argparse.Namespace, pairs: Pairs, model: Path, gpus: int, steps: int) -> list[Case]:
    """LoRA and full, live and cached."""
    return [
        Case(
            f"7b-{finetuning}-{reference}-{gpus}gpu",
            pairs,
            finetuning,
            reference,
            ranks=gpus,
            steps=steps,
            batch=asked.batch,
            model=model,
            device="cuda",
            zero3=finetuning == "full",
            gradient_checkpointing=asked.gradient_checkpointing,
            trl_accumulation=max(1, asked.batch // gpus // asked.trl_micro_pairs),
        )
        for finetuning in ("lora", "full")
        for reference in ("cached", "live")
    ]


def rows(result: Result, config: LlamaConfig, lengths: np.ndarray, peak: float | None) -> list[list[str]]:
    """A row of COLUMNS per side.

    Args:
        lengths: of the run's pairs in step order, int [steps * batch, 3].
        peak: TFLOP/s of one GPU; None leaves MFU out.
    """
    case, told = result.case, []
    full, live = case.finetuning == "full", case.reference == "live"
    shape = ModelShape.from_config(config, 0 if full else case.lora_rank)
    sides: list[Side] = ["trl", "dsdpo"]
    for side in sides:
        if why := result.failed(side):
            told.append([case.name, side, f"failed: {why}"] + ["-"] * (len(COLUMNS) - 3))
            continue
        logical, physical, shares = [], [], []
        for runs in result.rounds:
            for step, seconds in list(enumerate(runs[side].seconds))[result.warmup :]:
                pairs = Lengths.from_table(lengths[step * case.batch : (step + 1) * case.batch])
                shared = side == "dsdpo"
                logical.append(pairs.padded / seconds)
                physical.append(int(pairs.packed(shared).sum()) / seconds)
                shares.append(mfu(step_flops(shape, pairs, shared, live), seconds, case.ranks, peak or 1))
        told.append(
            [
                case.name,
                side,
                f"{result.throughput(side):.2f}",
                f"{statistics.median(logical):.0f}",
                f"{statistics.median(physical):.0f}",
                f"{statistics.median(shares):.1%}" if peak else "-",
                f"{result.memory(side):.1f}",
                f"{result.rounds[-1][side].losses[-1]:.4f}",
            ]
        )
    return told


def options() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", default="*", metavar="GLOB", help="names to run, such as `7b-lora-*` (all)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs (all)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pairs per step over all GPUs (16)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="mean tokens of a prompt (512)")
    parser.add_argument("--chosen", type=int, default=256, metavar="N", help="mean tokens of a chosen answer (256)")
    parser.add_argument("--rejected", type=int, default=256, metavar="N", help="mean tokens of a rejected one (256)")
    parser.add_argument("--spread", type=float, default=0.5, metavar="X", help="lengths vary by this share (0.5)")
    parser.add_argument(
        "--trl_micro_pairs", type=int, default=2, metavar="N", help="pairs of TRL's micro-batch: all that fit (2)"
    )
    parser.add_argument("--layers", type=int, default=32, metavar="N", help="decoder layers (32: 7B)")
    parser.add_argument("--peak_tflops", type=float, metavar="X", help="dense bf16 TFLOP/s of one GPU (by its name)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides")
    return parser.parse_args()


def main() -> None:
    """Make the model and the pairs, run, tell."""
    asked = options()
    end_runs_on_sigterm()
    if not torch.cuda.is_available():
        sys.exit("cuda_7b: needs an NVIDIA GPU that torch can use; there is none here. On a CPU: bench/against_trl.py")
    gpus, gpu, steps = asked.gpus or torch.cuda.device_count(), torch.cuda.get_device_name(0), asked.steps or 10
    peak = asked.peak_tflops or peak_tflops(gpu)
    if peak is None:
        print(f"no peak is known for {gpu}: no MFU without --peak_tflops")
    LLAMA_2_7B.num_hidden_layers = asked.layers
    print(*machine(), f"GPUs: {gpus} x {gpu}, peak {peak} TFLOP/s", sep="\n", flush=True)
    model = make_model(asked.work / f"llama-{asked.layers}-layers", LLAMA_2_7B, "cuda", torch.bfloat16)
    torch.cuda.empty_cache()
    lengths = (asked.prompt, asked.chosen, asked.rejected)
    pairs = make_pairs(asked.work / "pairs-7b", asked.batch * steps, lengths, asked.spread, LLAMA_2_7B.vocab_size)
    results, told = [], []
    for case in cases(asked, pairs, model.resolve(), gpus, steps):
        if fnmatch(case.name, asked.cases):
            result = compare(case, asked.rounds, asked.warmup, asked.work, asked.timeout)
            results.append(result)
            told += rows(result, LLAMA_2_7B, np.array(result.lengths), peak)
    print("\n" + table(told, COLUMNS, asked.markdown) + "\n")
    for result in results:
        print(*result.verdicts(), sep="\n")
    if asked.json:
        asked.json.write_text(json.dumps([result.record() for result in results], indent=1, default=str))


if __name__ == "__main__":
    main()
