"""The random generators of a rank, which dropout draws from: their states into a checkpoint and back."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

_TORCH, _DEVICE, _OTHERS = "random/torch", "random/device", "random/python"


def random_state() -> dict[str, torch.Tensor]:
    """uint8 [n] for each generator: torch's on the CPU and on this rank's GPU; Python's and numpy's as JSON."""
    numpy = np.random.get_state(legacy=False)
    text = json.dumps({"python": random.getstate(), "numpy": numpy}, default=np.ndarray.tolist)
    state = {
        _TORCH: torch.get_rng_state(),
        _OTHERS: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
    }
    if torch.cuda.is_available():
        state[_DEVICE] = torch.cuda.get_rng_state()
    return state


def random_keys(found: set[str]) -> list[str]:
    """Those of a file's keys that `set_random_state` takes."""
    return [key for key in (_TORCH, _DEVICE, _OTHERS) if key in found]


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state[_TORCH])
    if _DEVICE in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[_DEVICE])
    others = json.loads(state[_OTHERS].numpy().tobytes())
    version, keys, gauss = others["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(others["numpy"])


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Other states for another number of ranks, a function of the run's seed, the step and the rank alone."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    torch.manual_seed(int(words[0]))  # of every device
    random.seed(int(words[1]))
    np.random.seed(int(words[2]))
