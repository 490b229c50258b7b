"""SIGKILL at any moment, to anyone: the same command goes on, and ends with the same weights to the bit.

KILLS=N sets their number (12); `make test-faults KILLS=60` prints what came of them. `make test` has the first alone.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.runtime.rundir import RunDir
from tests.faults.place import Place, Run, losses, same_weights, steps_done

KILLS = int(os.environ.get("KILLS", "12"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
SAVE_STEPS = 3
POINTS = [
    "save:staged",
    "save:rank-written",
    "save:all-written",
    "save:manifest-written",
    "save:before-rename",
    "save:renamed",
]
ON_MAIN = POINTS[2:]
SETTINGS = {
    "zero0": (0, False, "full"),
    "zero1": (1, False, "lora"),
    "zero2": (2, False, "full"),
    "zero3": (3, False, "lora"),
    "zero3-offload": (3, True, "full"),
    "zero2-reward": (2, False, "rm"),
    "zero3-supervised": (3, False, "sft"),
    "zero1-labelled": (1, False, "kto"),
    "zero2-text": (2, False, "pt"),
    "zero3-quantized": (3, False, "4 bits"),
}


@dataclass
class Kill:
    """One kill: who dies, when, and in which setting."""

    setting: str
    asynchronous: bool
    victim: str  # rank, ranks, launcher, supervisor
    point: str | None  # a fault point inside a save; None: at a random moment of a random step
    at: int  # the how-manieth save, or the step
    rank: int = 0

    def __str__(self) -> str:
        kind = "async" if self.asynchronous else "sync"
        return f"{self.setting} {kind}: {self.victim} at {self.point or 'step'} {self.at}"


@dataclass
class Tally:
    """What came of the kills."""

    kills: Counter[str] = field(default_factory=Counter)
    inside_a_save: int = 0
    ended_before: int = 0
    wrong_resumes: int = 0
    lost_steps: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        who = ", ".join(f"{victim} {n}" for victim, n in self.kills.items())
        return (
            f"kills {sum(self.kills.values())} ({who}), inside a save {self.inside_a_save}, after the end "
            f"{self.ended_before}; wrong resumes {self.wrong_resumes}; most steps lost {dict(self.lost_steps)}, "
            f"with a save every {SAVE_STEPS}"
        )


def plan(count: int) -> Iterator[Kill]:
    """Half of them and more inside a save, all victims and settings in turn."""
    rng = random.Random(SEED)
    for number in range(count):
        victim = ["rank", "ranks", "launcher", "supervisor"][number % 4]
        setting, asynchronous = list(SETTINGS)[number % len(SETTINGS)], rng.random() < 0.5
        rank = rng.randrange(2) if victim == "rank" else 0
        if rng.random() < 0.7 or number % 5 == 0:
            points = POINTS if rank == 0 and victim != "ranks" else POINTS[:2]
            yield Kill(setting, asynchronous, victim, rng.choice(points), rng.randint(1, 4), rank)
        else:
            yield Kill(setting, asynchronous, victim, None, rng.randint(1, 11), rank)


KILL_PLAN = list(plan(KILLS))


def arguments(place: Place, kill: Kill) -> list[str]:
    stage, offload, kind = SETTINGS[kill.setting]
    options = {"full": [], "lora": ["--lora_dropout", "0.1"], "4 bits": ["--quantization_bit", "4"]}
    more = options.get(kind, ["--stage", kind])
    if kind in ("sft", "kto", "pt"):
        more += ["--dataset", f"{kind}.jsonl"]
    if kind == "sft":
        more += ["--neftune_noise_alpha", "5"]
    finetuning = "full" if kind == "full" else "lora"
    common = ["--deepspeed", place.zero(stage, offload), "--finetuning_type", finetuning]
    return [*common, "--async_save", str(kill.asynchronous), *more]


def carry_out(place: Place, kill: Kill, out: str) -> tuple[Run, bool]:
    """Start a run and kill. Returns it, and whether there was something left to kill."""
    fault = {}
    if kill.point:
        who = f"#{kill.rank}" if kill.victim == "rank" else ""
        held = "" if kill.victim in ("rank", "ranks") else "=3"
        if kill.victim != "ranks" and kill.point in ON_MAIN:
            who = "#0"
        fault = {"DSDPO_FAULT": f"{kill.point}@{kill.at}{who}{held}"}
    run = place.start(out, *arguments(place, kill), **fault)
    step = SAVE_STEPS * kill.at if kill.point else kill.at
    if kill.point and kill.victim in ("rank", "ranks"):
        run.wait()
        return run, "SIGKILL" in run.output
    if kill.point:
        folder = run.out / "checkpoints" / f"step-{step:08d}"
        there = folder.exists if kill.point == "save:renamed" else folder.with_suffix(".tmp").exists
        run.until(there, str(folder))
    else:
        run.until_step(step)
        time.sleep(random.Random(step).random() * 0.05)
    victims: list[psutil.Process] = []
    try:
        victims = {
            "rank": lambda: run.ranks()[kill.rank : kill.rank + 1],
            "ranks": run.ranks,
            "launcher": lambda: [run.launcher()],
            "supervisor": lambda: [psutil.Process(run.process.pid)],
        }[kill.victim]()
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
    except (psutil.Error, StopIteration):
        pass
    run.wait()
    return run, bool(victims)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts the kills of this process, and is printed at their end."""
    counted = Tally()
    yield counted
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{counted}", flush=True)


def whole(place: Place, kill: Kill) -> Path:
    """A run in the same setting that nobody kills."""
    out = place.folder / f"whole-{kill.setting}"
    if not out.exists():
        code, output = place.run_ranks(out.name, *arguments(place, kill), "--save_steps", "1000")
        assert code == 0, output
    return out


def test_most_kills_come_inside_a_save() -> None:
    for count in (1, 12, 60):
        assert 2 * sum(kill.point is not None for kill in plan(count)) >= count
    assert 2 * sum(kill.point is not None for kill in KILL_PLAN) >= KILLS


@pytest.mark.parametrize(
    "number", [pytest.param(0), *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, KILLS))]
)
def test_a_kill(place: Place, tally: Tally, capsys: pytest.CaptureFixture[str], number: int) -> None:
    kill = KILL_PLAN[number]
    expected = whole(place, kill)
    run, was_hit = carry_out(place, kill, f"killed-{number}")
    done, completed = steps_done(run.out), (run.out / "COMPLETED").exists()
    tally.kills[kill.victim] += 1
    tally.inside_a_save += kill.point is not None
    tally.ended_before += completed
    # Without a flag. A supervisor that was killed leaves orphans, which the next one ends.
    run_again = place.run if kill.victim == "supervisor" or number == 0 else place.run_ranks
    code, output = run_again(run.out.name, *arguments(place, kill))
    run.until_nobody_is_left()
    resumed = re.search(r"resumed after step (\d+)", output)
    if "nothing to do" in output:  # ranks without a supervisor came to the end before they noticed
        completed = True
    start = int(resumed[1]) if resumed else done if completed else 0
    lost = 0 if completed else done - start
    kind = "async" if kill.asynchronous else "sync"
    tally.lost_steps[kind] = max(tally.lost_steps[kind], lost)
    right = code == 0 and same_weights(expected, run.out) and losses(run.out) == losses(expected)
    sound = all(not checkpoint.problem for checkpoint in checkpoints(RunDir(run.out)))
    is_wrong = not (right and sound and (completed or was_hit))
    tally.wrong_resumes += is_wrong
    with capsys.disabled():
        print(f"\n{number + 1}/{KILLS} {kill}: {done} steps done, resumed after {start}", flush=True)
    assert not is_wrong, f"{kill}: exit {code}, from step {start}\n{run.output[-1500:]}\n---\n{output[-3000:]}"
    assert lost <= (2 * SAVE_STEPS if kill.asynchronous else SAVE_STEPS)
