"""How long training stands still for a checkpoint, written at once or beside the training; and how long a seek takes.

    python bench/saving.py [--rounds N]

SmolLM2-135M in full, ZeRO-3 on two CPU ranks. What counts is how long the training thread waits: with async_save, for
the copy to the host's memory, and later for the commit of what another thread has written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"
STEP_10_6 = 10**6


def main() -> None:
    """As a user types it: starts the ranks; as a rank: measures."""
    parser = argparse.ArgumentParser(description="time that a checkpoint takes from the training")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        _saves(arguments.rounds)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__]
    subprocess.run([*line, "--rounds", str(arguments.rounds)], env=environment, check=True)
    _seeks(arguments.rounds)


def _saves(rounds: int) -> None:
    from dsdpo.checkpoint.saver import Saver
    from dsdpo.config.schema import RunConfig
    from dsdpo.config.zero import ZeroConfig
    from dsdpo.engine.engine import build_engine, start_process_group
    from dsdpo.engine.zero_state import set_adam_step, trained_weights
    from dsdpo.plan.memory import checkpoint_bytes
    from dsdpo.runtime.env import launched

    mesh = launched()
    assert mesh is not None
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder:
        options: dict[str, Any] = {
            "model_name_or_path": str(SMOLLM2),
            "dataset": "none",
            "finetuning_type": "full",
            "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
            "precision": "fp32",
        }
        found: dict[str, list[float]] = {"sync": [], "async": [], "copy": [], "commit": [], "written": []}
        engine = None
        for kind in ("sync", "async"):
            config = RunConfig(**options, output_dir=f"{folder}/{kind}", async_save=kind == "async")
            if engine is None:
                zero = ZeroConfig.load(config)
                hardware = start_process_group(config, zero, mesh)
                engine = build_engine(config, zero, mesh, hardware)
                set_adam_step(engine, 1)
            saver = Saver(config, engine, mesh, {}, lambda line: None)
            for number in range(rounds + 1):  # the first one makes the buffers
                started = time.perf_counter()
                saver.save(number + 1)
                saved = time.perf_counter()
                while kind == "async" and not saver.status.written:
                    time.sleep(0.01)
                written = time.perf_counter()
                saver.finish()
                ended = time.perf_counter()
                if number:
                    found[kind].append(saved - started + (ended - written if kind == "async" else 0))
                    if kind == "async":
                        found["copy"].append(saved - started)
                        found["commit"].append(ended - written)
                        found["written"].append(written - saved)
        if mesh.is_main:
            medians = {key: round(statistics.median(values), 3) for key, values in found.items()}
            share = medians["async"] / medians["sync"]
            gib = round(checkpoint_bytes(trained_weights(engine)) / 2**30, 2)
            print(json.dumps({"GiB": gib, "seconds": medians, "share": round(share, 3)}))


class _Endless:
    """10^8 examples of made-up ids."""

    fingerprint = ""
    earlier_fingerprints: ClassVar[dict[int, str]] = {}
    template_date = None
    end_token = None

    def __len__(self) -> int:
        return 10**8

    @property
    def sizes(self) -> list[int]:
        """One set."""
        return [len(self)]

    def lengths(self, ids: np.ndarray) -> Any:
        from dsdpo.data.example import Lengths

        n = len(ids)
        tokens = np.tile([40, 50], n)
        return Lengths(np.full(n, 100), np.full(n, 2), tokens, tokens)

    def scores(self, ids: np.ndarray) -> np.ndarray:
        return np.full(2 * len(ids), np.nan)

    def weights(self, ids: np.ndarray) -> np.ndarray:
        return np.ones(len(ids))

    def digests(self, ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def where(self, index: int) -> str:
        return str(index)

    def example(self, index: int) -> Any:
        from dsdpo.data.example import TokenizedExample

        prompt, *completions = (np.arange(n) + index % 7 for n in (100, 40, 50))
        return TokenizedExample(prompt, tuple(completions))


def _seeks(rounds: int) -> None:
    from dsdpo.data.loader import BatchLoader
    from dsdpo.runtime.env import Mesh

    loader = BatchLoader(_Endless(), Mesh(0, 8, 0), 4096, share_prefix=True)

    def first_batch(step: int) -> float:
        started = time.perf_counter()
        batches: Iterator[Any] = loader.training_batches(range(step, step + 2), 64, 42)
        next(batches)
        return time.perf_counter() - started

    times = {step: [first_batch(step) for _ in range(rounds + 1)][1:] for step in (0, STEP_10_6)}
    print(
        json.dumps(
            {f"first batch at step {step}, ms": round(1e3 * statistics.median(x), 2) for step, x in times.items()}
        )
    )


if __name__ == "__main__":
    main()
