"""A run that is killed and resumed beside one that nobody kills: do both end with the same weights?

    python -m bench.kill_and_resume --work DIR [--device cpu]

SIGKILL to everything that `dsdpo train` has started, in the seventh step of twelve; the same command then resumes from
the checkpoint after the fourth. On a CPU the weights must be equal to the bit, on a GPU to TOLERANCE.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.starting import ROOT, make_run

STEPS, SAVE_STEPS, KILLED_IN = 12, 4, 7
TOLERANCE = 1e-3  # of the largest weight: kernels that add in any order
_START_S = 120.0


def main(line: list[str] | None = None) -> None:
    """Run both, compare; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked = parser.parse_args(line)
    asked.work.mkdir(parents=True, exist_ok=True)
    config = make_run(asked.work.resolve())
    settings = yaml.safe_load(config.read_text())
    settings |= {"max_steps": STEPS, "save_steps": SAVE_STEPS, "precision": "auto", "max_tokens_per_row": 512}
    config.write_text(yaml.safe_dump(settings))
    unbroken, killed = asked.work / "unbroken", asked.work / "killed"
    finish(config, unbroken, asked.device)
    steps = kill(config, killed, asked.device)
    finish(config, killed, asked.device)
    difference = largest_difference(unbroken / "final", killed / "final")
    told = "equal to the bit" if difference == 0 else f"{difference:.1e} of the largest weight apart"
    print(f"killed after step {steps} of {STEPS} and resumed: the weights are {told}")
    if difference > (TOLERANCE if asked.device == "cuda" else 0.0):
        sys.exit(1)


def finish(config: Path, output_dir: Path, device: str) -> None:
    """A run to its end. Ends the program with the run's output if it fails."""
    process = subprocess.run(_command(config, output_dir), env=_environment(device), capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{output_dir.name} ended with {process.returncode}:\n{(process.stdout + process.stderr)[-3000:]}")


def kill(config: Path, output_dir: Path, device: str) -> int:
    """Start a run that stands still in a step, and kill it there. Returns the steps that it has reported."""
    environment = _environment(device) | {"DSDPO_FAULT": f"forward@{KILLED_IN}={_START_S:.0f}"}
    process = subprocess.Popen(
        _command(config, output_dir), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    metrics, until = output_dir / "metrics.jsonl", time.monotonic() + 2 * _START_S
    wanted = KILLED_IN - 2  # a step is reported while the next one is under way
    while (steps := _lines(metrics)) < wanted and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    if steps < wanted:
        sys.exit(f"the run came to step {steps} only")
    root = psutil.Process(process.pid)
    for victim in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    return steps


def largest_difference(one: Path, other: Path) -> float:
    """Between the weights of two exported folders, as a part of the largest weight."""
    difference = largest = 0.0
    files = sorted(path.name for path in one.glob("*.safetensors"))
    if not files:
        sys.exit(f"{one} has no weights")
    for name in files:
        first, second = load_file(one / name), load_file(other / name)
        if first.keys() != second.keys():
            sys.exit(f"{name} holds other tensors after the resume")
        for key, tensor in first.items():
            if not torch.equal(tensor, second[key]):
                difference = max(difference, float((tensor.float() - second[key].float()).abs().max()))
            largest = max(largest, float(tensor.float().abs().max()))
    return difference / largest if largest else difference


def _command(config: Path, output_dir: Path) -> list[str]:
    command = [sys.executable, "-m", "dsdpo", "train", str(config), "--num_accelerators", "1"]
    return [*command, "--output_dir", str(output_dir)]


def _environment(device: str) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return environment | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    main()
