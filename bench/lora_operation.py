"""The linear layers of a decoder layer with adapters, forward and backward: as one operation beside PEFT's own forward.

    python bench/lora_operation.py [--dtype bfloat16] [--hidden 4096 --intermediate 11008 --tokens 8192]

Prints the median ratio of their times, taken in turn, the kernels that each starts, and on CUDA the peak memory. On a
CPU the times are the process's own CPU seconds, so that other processes matter little.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import peft
import torch
from torch import nn
from torch.nn import functional

from dsdpo.model.lora import fuse_lora

_KERNELS = ("mm", "addmm", "addmm_", "add", "add_", "mul", "mul_", "cat", "copy_", "clone", "sum", "sigmoid")


class Layer(nn.Module):
    """A decoder layer without norms, and with a product in place of attention."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 0.5
        x = x + self.o_proj(self.q_proj(h) * self.k_proj(h) + self.v_proj(h))
        h = x * 0.5
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


def step(layer: nn.Module, x: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    on_cuda = x.device.type == "cuda"
    layer.zero_grad()
    if on_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if on_cuda else time.process_time
    started = clock()
    layer(x).sum().backward()
    if on_cuda:
        torch.cuda.synchronize()
    return clock() - started


def kernels(layer: nn.Module, x: torch.Tensor) -> int:
    """How many operations that start a kernel a forward and a backward pass have."""
    with torch.profiler.profile() as profile:
        step(layer, x)
    names = [event.name for event in profile.events()]
    return sum(name.removeprefix("aten::") in _KERNELS for name in names)


def main() -> None:
    """Time a step of both in turn, count the kernels that each starts, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 512, "intermediate": 1408, "tokens": 512, "rank": 16, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=r".*_proj")
    theirs: Any = peft.inject_adapter_in_model(lora, Layer(args.hidden, args.intermediate)).to(device, dtype)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    x = torch.randn(1, args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    times: dict[str, list[float]] = {"peft": [], "fused": []}
    for _ in range(args.rounds + 1):
        for name, layer in (("peft", theirs), ("fused", ours)):
            times[name].append(step(layer, x))
    ratio = statistics.median(p / f for p, f in list(zip(times["peft"], times["fused"]))[1:])
    seconds = {name: f"{statistics.median(found[1:]):.4f} s" for name, found in times.items()}
    print(f"{device}, {args.dtype}, {args.tokens} tokens of {args.hidden}: {seconds}, PEFT / fused {ratio:.3f}")
    print({name: kernels(layer, x) for name, layer in (("peft", theirs), ("fused", ours))}, "kernels")
    for name, layer in (("peft", theirs), ("fused", ours)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(layer, x)
            print(name, f"{torch.cuda.max_memory_allocated() / 2**30:.3f} GiB at most")


if __name__ == "__main__":
    main()
