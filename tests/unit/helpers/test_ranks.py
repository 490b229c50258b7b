"""Ranks for tests: forked ones are what new interpreters would be, and how one ends is seen."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import ROOT, run_as_ranks, run_ranks

HERE = "tests.unit.helpers.test_ranks"


def look() -> dict[str, Any]:
    """What a rank finds; runs on each."""
    import torch

    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR")}
    found |= {name: os.environ.get(name) for name in ("JE_ARROW_MALLOC_CONF", "OF_THIS_TEST")}
    preload = sys.modules.get("tests.helpers.preload")
    return {
        **found,
        "threads": preload.THREADS if preload else 1,
        "torch": (torch.get_num_threads(), torch.distributed.is_initialized()),
        "folder": Path.cwd(),
        "start method": __import__("multiprocessing").get_start_method(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    }


def draw() -> tuple[float, float, float]:
    import numpy as np
    import torch

    return random.random(), float(np.random.random()), float(torch.rand(()))


def end(rank: int, how: str) -> None:
    """Rank `rank` ends so; the others end well."""
    print(f"said by {os.environ['RANK']}", flush=True)
    if int(os.environ["RANK"]) != rank:
        return
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "code":
        os._exit(9)
    if how == "hangs":
        threading.Event().wait()
    raise ValueError("of its own")


def import_beside() -> None:
    """A thread that imports."""
    thread = threading.Thread(target=__import__, args=("this",), name="importer")
    thread.start()
    thread.join()


@pytest.mark.start
def test_a_forked_rank_finds_what_a_new_interpreter_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THIS_TEST", "1")
    forked = run_ranks(f"{HERE}:look", 2)
    assert forked[0] == {**run_ranks(f"{HERE}:look", 1, fresh=True)[0], "WORLD_SIZE": "2"}
    assert forked[1] == {**forked[0], "RANK": "1"}
    assert forked[0]["threads"] == 1 and forked[0]["folder"] == ROOT and forked[0]["OF_THIS_TEST"] == "1"


@pytest.mark.start
def test_ranks_draw_numbers_of_their_own() -> None:
    one, other = run_ranks(f"{HERE}:draw", 2)
    assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("how", "code"), [("killed", -9), ("code", 9), ("raises", 1)])
def test_how_a_rank_ends_is_told_with_what_each_has_said(how: str, code: int) -> None:
    with pytest.raises(AssertionError) as error:
        run_ranks(f"{HERE}:end", 2, 1, how)
    told = str(error.value)
    assert f"[0, {code}]" in told and "said by 0" in told and "said by 1" in told
    assert ("ValueError: of its own" in told) == (how == "raises")


def test_a_rank_that_hangs_is_killed_and_told() -> None:
    with pytest.raises(AssertionError, match=", None]"):
        run_ranks(f"{HERE}:end", 2, 1, "hangs", timeout=3)


def test_a_thread_that_imports_fails_the_rank() -> None:
    with pytest.raises(AssertionError, match="importer: this"):
        run_ranks(f"{HERE}:import_beside", 1)


@pytest.mark.start
def test_a_command_ends_with_its_code_and_output(tmp_path: Path) -> None:
    """And its peers are ended with it: they would wait for the main rank."""
    code, output = run_as_ranks(2, "train", str(tmp_path / "none.yaml"))
    assert code == 64 and "none.yaml" in output
