"""What one rank holds while it loads a quantized model, and reading back what a run has trained."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.engine import build_engine, start_process_group
from dsdpo.runtime.env import launched
from tests.dist.grid import run_config

_EVERY_S = 0.002


def anonymous_bytes() -> int:
    """Of this process's resident memory, what is no mapped file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def peak() -> Iterator[list[int]]:
    """A list whose one number grows to the most that `anonymous_bytes` is inside."""
    most, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY_S):
            most[0] = max(most[0], anonymous_bytes())

    thread = threading.Thread(target=watch, name="memory")
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
        most[0] = max(most[0], anonymous_bytes())


def load_and_watch(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Build the engine of each case (changes to `run_config`) in one process group.

    Returns:
        For each: `before`, this rank's memory with everything imported; `peak` while the engine is built; `packed`, the
        4-bit weights that it holds then, in bytes.
    """
    mesh = launched()
    assert mesh is not None
    found = []
    for case in cases:
        config = run_config(folder=Path(folder), finetuning_type="lora", precision="bf16", **case)
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        before = anonymous_bytes()
        with peak() as most:
            engine = build_engine(config, zero, mesh, hardware)
        weights = [p for p in engine.module.parameters() if getattr(p, "quant_state", None) is not None]
        packed = sum(p.data.nbytes + (p.ds_tensor.nbytes if hasattr(p, "ds_tensor") else 0) for p in weights)
        found.append({"before": before, "peak": most[0], "packed": packed})
        engine.destroy()
        del engine, weights
    torch.distributed.destroy_process_group()
    return found
