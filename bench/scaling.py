"""How long a step takes on 1 to 512 GPUs, and what it waits for: a model, not a measurement.

    python bench/scaling.py llama-2-7b --gpus 1,8,64,512 --stage 3 --gpu h100
    python bench/scaling.py path/to/model --lora_rank 16 --network_gb_s 25 --tflops 420 --link_gb_s 330 --memory

The model is `llama-2-7b`, `llama-2-70b`, or a folder with a config.json. A step is

    compute   operations (dsdpo/plan/flops.py) of the longest micro-batch of every micro-step, plus what is computed
              twice, over the GPU's FLOP/s
    links     bytes sent (dsdpo/plan/traffic.py) by collectives of one node, over the GPU's link
    network   the same for collectives over several nodes: a ring goes as fast as its slowest piece, which is the GPU's
              link or all network cards of a node together
    host      bytes over PCIe with state on the CPU or NVMe; bytes of NVMe
    update    bytes that AdamW reads and writes, over the memory's rate: the GPU's, or the CPU's

and takes at least the largest of the first four, plus the update (all overlapped), and at most the sum of all five.
Collectives add latency per hop as NCCL's own tuning model has it (src/graph/tuning.cc: 8.4 us, 3.4 us per hop inside a
node and 14 us between nodes, ring, Simple protocol).

Rates that are given are used as they are: measure them (MFU of bench/cuda_7b.py; busbw of nccl-tests). The defaults are
the vendors' data sheets times an assumed share, and every output says so.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.models import load_config
from bench.report import table
from dsdpo.plan.memory import RECOMPUTE, USABLE, activation_bytes_per_token, gpu_bytes
from dsdpo.plan.setup import Setup
from dsdpo.plan.shape import ModelShape
from dsdpo.plan.steptime import COMPUTE_SHARE, GPUS, WIRE_SHARE, Job, Rates, Step, draw_lengths, efficiency, predict

COLUMNS = (
    "GPUs",
    "pairs",
    "m",
    "compute s",
    "links s",
    "network s",
    "host s",
    "update s",
    "step s",
    "pairs/s",
    "efficiency",
    "GB sent/GPU",
    "bound by",
    "network to hide GB/s",
)


def cells(step: Step, one: Step) -> list[str]:
    """One row of COLUMNS; two numbers where overlap decides: nothing overlapped, everything overlapped.

    Args:
        one: the same pairs on one GPU.
    """
    seconds = [f"{value:.3g}" for value in (step.compute, step.links, step.network, step.host, step.update)]
    speeds = [step.examples / total for total in (step.most, step.least)]
    shares = [efficiency(step, one, end) for end in ("most", "least")]
    return [
        *(str(n) for n in (step.gpus, step.examples, step.micro_steps)),
        *seconds,
        f"{step.most:.3g} to {step.least:.3g}",
        f"{speeds[0]:.3g} to {speeds[1]:.3g}",
        f"{min(shares):.0%} to {max(shares):.0%}",
        f"{step.sent / 1e9:.3g}",
        step.bound,
        f"{step.crossing / step.compute / 1e9:.3g}" if step.crossing else "-",
    ]


def memory_lines(job: Job, counts: list[int]) -> list[str]:
    """GiB of each GPU by part, a line for each number of GPUs."""
    per_token = activation_bytes_per_token(job.shape, job.setup.element, job.recompute)
    lines = []
    for gpus in counts:
        parts = {**gpu_bytes(job.shape, job.setup, gpus), f"row of {job.row_tokens}": per_token * job.row_tokens}
        total = sum(parts.values())
        verdict = "fits" if total < USABLE * job.rates.memory else "does NOT fit"
        told = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        held, room = (f"{value / 2**30:{form}}" for value, form in ((total, ".1f"), (job.rates.memory, ".0f")))
        lines.append(f"{gpus} GPU{'s' * (gpus > 1)}: {held} GiB each, {verdict} in {room}: {told}")
    return lines


def assumptions(job: Job, asked: argparse.Namespace) -> list[str]:
    """A line for each thing that is not known."""
    rates = job.rates
    share = "as given" if asked.tflops else f"data sheet of {asked.gpu} times {COMPUTE_SHARE}, assumed"
    wires = f"as given, or data sheet times {WIRE_SHARE}, assumed"
    return [
        "a model, nothing is measured here",
        f"compute: {rates.flops / 1e12:.0f} TFLOP/s a GPU reached ({share}), whatever the length of its row",
        f"wires: {rates.link / 1e9:.0f} GB/s a GPU in a node, {rates.network / 1e9:.0f} GB/s a node to others, "
        f"{rates.pcie / 1e9:.0f} GB/s PCIe, one direction ({wires}); nobody else uses the network",
        f"host: {rates.cpu / 1e9:.0f} GB/s CPU memory, {rates.nvme / 1e9:.0f} GB/s NVMe a node (as given, or assumed)",
        "step, pairs/s: from everything one after another, to all but the update at the same time",
        "efficiency: pairs/s per GPU over those of one GPU that trains the same step and has the memory for it",
        f"pairs: {asked.prompt} + {asked.chosen} + {asked.rejected} tokens +- {asked.spread:.0%}, dealt by dsdpo's own "
        f"packing into rows of {job.row_tokens} in m micro-steps, each as slow as its longest row",
        "left out: reading data, saves, evaluations, the pass that fills a cached reference, Python between kernels",
    ]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="llama-2-7b, llama-2-70b, or a folder with config.json")
    add("--gpus", default="1,8,64,512", metavar="N,N", help="numbers of GPUs (1,8,64,512)")
    add("--gpus_per_node", type=int, default=8, metavar="N", help="(8)")
    add("--stage", type=int, default=3, choices=range(4), help="ZeRO stage (3)")
    add("--hpz", action="store_true", help="ZeRO++ hpZ over the GPUs of a node")
    add("--offload_optimizer", default="gpu", choices=["gpu", "cpu", "nvme"], help="where the optimizer is (gpu)")
    add("--offload_param", default="gpu", choices=["gpu", "cpu", "nvme"], help="where the weights are (gpu)")
    add("--lora_rank", type=int, default=0, metavar="R", help="0: full fine-tuning (0)")
    add("--quantization_bit", type=int, choices=[4, 8], metavar="N", help="4 or 8, of frozen weights under LoRA")
    add("--reference", default="cached", choices=["cached", "live"], help="(cached)")
    which = "which activations are recomputed (none; without a word: full)"
    add("--gradient_checkpointing", nargs="?", const="full", default="none", choices=RECOMPUTE, help=which)
    add("--pairs_per_gpu", type=int, default=8, metavar="N", help="pairs a step for each GPU (8)")
    add("--train_batch_size", type=int, metavar="N", help="pairs a step over all GPUs, instead")
    add("--max_tokens_per_row", type=int, default=8192, metavar="N", help="(8192)")
    for name, mean in (("prompt", 512), ("chosen", 256), ("rejected", 256)):
        add(f"--{name}", type=int, default=mean, metavar="N", help=f"mean tokens ({mean})")
    add("--spread", type=float, default=0.5, metavar="X", help="lengths vary by this share (0.5)")
    add("--gpu", default="h100", choices=GPUS, help="whose data sheet gives what is not given below (h100)")
    add("--tflops", type=float, metavar="X", help="reached by one GPU: its MFU times its peak")
    add("--gpu_memory", type=float, metavar="GiB", help="of one GPU")
    for name, what in (("link", "a GPU sends in its node"), ("network", "a node sends to others")):
        add(f"--{name}_gb_s", type=float, metavar="X", help=f"what {what}, one direction: busbw of nccl-tests")
    for name in ("pcie", "cpu", "nvme"):
        add(f"--{name}_gb_s", type=float, metavar="X", help="for offloading")
    add("--memory", action="store_true", help="GPU memory by part instead of time")
    add("--markdown", action="store_true", help="the table as Markdown")
    return parser.parse_args()


def rates_of(asked: argparse.Namespace) -> Rates:
    """The data sheet's, with what is given in its place."""
    given = {name: getattr(asked, f"{name}_gb_s") for name in ("link", "network", "pcie", "cpu", "nvme")}
    changes = {name: 1e9 * rate for name, rate in given.items() if rate}
    if asked.tflops:
        changes["flops"] = 1e12 * asked.tflops
    if asked.gpu_memory:
        changes["memory"] = 2**30 * asked.gpu_memory
    return replace(GPUS[asked.gpu], **changes)


def job_of(asked: argparse.Namespace, shape: ModelShape, pairs: int) -> Job:
    """The job that the command line asks for, with so many pairs a step."""
    setup = Setup(
        stage=asked.stage or 1,  # stage 0 in bf16 runs as 1
        live=asked.reference == "live",
        hpz=asked.gpus_per_node if asked.hpz else 1,
        optimizer=asked.offload_optimizer,
        weights=asked.offload_param,
        bits=asked.quantization_bit,
    )
    return Job(
        shape=shape,
        setup=setup,
        rates=rates_of(asked),
        gpus_per_node=asked.gpus_per_node,
        row_tokens=asked.max_tokens_per_row,
        recompute=asked.gradient_checkpointing,
        lengths=draw_lengths(pairs, (asked.prompt, asked.chosen, asked.rejected), asked.spread),
    )


def main() -> None:
    """Predict and tell."""
    asked = options()
    shape = ModelShape.from_config(load_config(asked.model), asked.lora_rank)
    counts = [int(n) for n in asked.gpus.split(",")]
    pairs = {gpus: asked.train_batch_size or gpus * asked.pairs_per_gpu for gpus in counts}
    jobs = {gpus: job_of(asked, shape, pairs[gpus]) for gpus in pairs}
    print(f"{asked.model}: {shape.total / 1e9:.2f}e9 weights, {shape.trained / 1e9:.3g}e9 trained; bf16")
    if asked.memory:
        print(*memory_lines(jobs[counts[0]], counts), sep="\n")
        return
    rows = [cells(predict(job, gpus), predict(job, 1)) for gpus, job in jobs.items()]
    print(table(rows, COLUMNS, asked.markdown))
    print(*(f"- {line}" for line in assumptions(jobs[counts[0]], asked)), sep="\n")


if __name__ == "__main__":
    main()
