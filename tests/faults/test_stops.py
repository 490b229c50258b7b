"""Requests to stop: the step ends, a checkpoint is committed, exit code 75, nobody is left, the run goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.runtime.rundir import RunDir
from tests.faults.place import ROOT, Place, Run, losses, records, same_weights, steps_done
from tests.helpers.ranks import free_port

LONG = ["--max_steps", "80", "--save_steps", "1000"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("stops"))


def zero3(place: Place) -> list[str]:
    return ["--deepspeed", place.zero(3), "--lora_dropout", "0.1"]


@pytest.fixture(scope="module")
def whole(place: Place) -> Callable[[int], Path]:
    """An uninterrupted run on so many ranks."""

    def made(ranks: int) -> Path:
        out = place.folder / f"whole-{ranks}"
        if not out.exists():
            code, output = place.run_ranks(out.name, *zero3(place), *LONG, ranks=ranks)
            assert code == 0, output
        return out

    return made


def request_by_signal(number: signal.Signals) -> Callable[[Run], None]:
    return lambda run: run.process.send_signal(number)


REQUESTS: dict[str, Callable[[Run], None]] = {
    "SIGTERM": request_by_signal(signal.SIGTERM),
    "SIGUSR1": request_by_signal(signal.SIGUSR1),
    "Ctrl-C": request_by_signal(signal.SIGINT),
    "STOP file": lambda run: (run.out / "STOP").touch(),
}


@pytest.mark.parametrize(
    ("request_", "ranks"),
    [
        ("SIGTERM", 2),
        pytest.param("SIGUSR1", 2, marks=pytest.mark.slow),
        pytest.param("Ctrl-C", 3, marks=pytest.mark.slow),
        pytest.param("STOP file", 2, marks=pytest.mark.slow),
    ],
)
def test_a_request_saves_and_the_same_command_goes_on(
    place: Place, whole: Callable[[int], Path], request_: str, ranks: int
) -> None:
    """Rows are so short that a step has several micro-steps: the request comes between them."""
    expected = whole(ranks)
    name = f"{request_}-{ranks}"
    run = place.start(name, *zero3(place), *LONG, ranks=ranks)
    assert run.until_step(20)
    REQUESTS[request_](run)
    code, output = run.wait()
    assert code == 75, output
    run.until_nobody_is_left()
    done = checkpoints(RunDir(run.out))[0].step
    assert not checkpoints(RunDir(run.out))[0].problem and 20 <= done < 80 and done >= steps_done(run.out)
    assert not (run.out / "final").exists() and not (run.out / "COMPLETED").exists()
    run_again = place.run if request_ == "SIGTERM" else place.run_ranks  # once with supervisor and launcher
    code, output = run_again(name, *zero3(place), *LONG, ranks=ranks)
    assert code == 0 and f"resumed after step {done}" in output, output
    assert losses(run.out) == losses(expected) and same_weights(run.out, expected)


@pytest.mark.slow
def test_max_time(place: Place, whole: Callable[[int], Path]) -> None:
    code, output = place.run("time", *zero3(place), "--max_time", "1s", *LONG)
    assert code == 75 and "stopped on request after step" in output, output
    code, output = place.run_ranks("time", *zero3(place), *LONG)
    assert code == 0, output
    assert same_weights(place.folder / "time", whole(2))


@pytest.mark.slow
def test_a_request_during_a_save_of_40_s(place: Place, whole: Callable[[int], Path]) -> None:
    """DeepSpeed's own launcher would kill the ranks after 30 s."""
    run = place.start(
        "slow-save", *zero3(place), *LONG[:2], "--save_steps", "30", DSDPO_FAULT="save:rank-written@1#1=40"
    )
    assert run.until((run.out / "checkpoints" / "step-00000030.tmp").exists, "the save")
    run.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    code, output = run.wait()
    assert code == 75 and time.monotonic() - started > 35, output
    run.until_nobody_is_left()
    code, output = place.run_ranks("slow-save", *zero3(place), *LONG)
    assert code == 0 and same_weights(run.out, whole(2)), output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "done", "save_steps"),
    [pytest.param(1, 2, "2", id="on the way"), pytest.param(5, 6, "", id="the last one, and no checkpoint")],
)
def test_a_request_during_an_evaluation(place: Place, batch: int, done: int, save_steps: str) -> None:
    """It is left, and made up for; where it is the last one, the weights are exported before."""
    more = [*zero3(place), "--max_steps", "6", "--save_steps", save_steps, "--eval_steps", "2", "--val_size", "16"]
    whole = place.folder / "evaluated"
    if not whole.exists():
        code, output = place.run_ranks(whole.name, *more)
        assert code == 0, output
    run = place.start(f"evaluation-{done}", *more, DSDPO_FAULT=f"evaluation:batch@{batch}#0=15")
    assert run.until_step(done)
    (run.out / "STOP").touch()
    code, output = run.wait()
    assert code == 75 and [c.step for c in checkpoints(RunDir(run.out))] == [done], output
    again = place.start(run.out.name, *more, DSDPO_FAULT="evaluation:batch@1#0=15")  # in what makes up for it
    assert again.until(lambda: f"resumed after step {done}" in again.output, "the resumed run")
    (run.out / "STOP").touch()
    code, output = again.wait()
    assert code == 75 and [c.step for c in checkpoints(RunDir(run.out))] == [done], output
    assert (run.out / "final").exists() == (done == 6) and not (run.out / "COMPLETED").exists()
    code, output = place.run_ranks(run.out.name, *more)
    assert code == 0 and f"resumed after step {done}" in output, output
    means = [[{k: x[k] for k in x if "loss" in k or k == "step"} for x in records(out)] for out in (run.out, whole)]
    assert means[0] == means[1] and same_weights(run.out, whole)


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_without_harm(place: Place, whole: Callable[[int], Path]) -> None:
    more = [*LONG[:2], "--save_steps", "30"]
    run = place.start("twice", *zero3(place), *more, DSDPO_FAULT="save:rank-written@2#1=120")
    assert run.until((run.out / "checkpoints" / "step-00000060.tmp").exists, "the second save")
    started = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    code, _ = run.wait()
    assert code == 130 and time.monotonic() - started < 60
    run.until_nobody_is_left()
    code, output = place.run_ranks("twice", *zero3(place), *more)
    assert code == 0 and "resumed after step 30" in output, output
    assert same_weights(run.out, whole(2))


def test_a_rank_that_is_stopped_is_named(place: Place, whole: Callable[[int], Path]) -> None:
    timeout = 10.0
    more = ["--max_steps", "100000", "--save_steps", "25", "--save_total_limit", "2", "--hang_timeout", str(timeout)]
    run = place.start("hang", *zero3(place), *more)
    assert run.until_step(60)
    run.ranks()[1].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    code, output = run.wait()
    assert code == 71 and time.monotonic() - started < timeout + 60, output
    assert "rank 1 (host" in output and "without a sign of life" in output
    assert "in train" in (run.out / "ranks" / "stacks-00000.txt").read_text()
    run.until_nobody_is_left()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_71(place: Place) -> None:
    run = place.start("dead", *zero3(place), "--max_steps", "100000")
    assert run.until_step(10)
    first, second = run.ranks()
    launcher = run.launcher()
    launcher.suspend()  # it looks once a second at most; what it finds first is the cause
    first.kill()
    time.sleep(2)
    status = second.status()
    launcher.resume()
    assert status != psutil.STATUS_ZOMBIE, "it failed, as it lost its peer, before that was seen"
    code, output = run.wait()
    assert code == 71 and "SIGKILL" in output, output
    run.until_nobody_is_left()


def with_own_launcher(place: Place, name: str, *more: str) -> Run:
    """`deepspeed … --module dsdpo train …`."""
    out = place.folder / name
    line = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    line += ["--master_port", str(free_port()), "--module", "dsdpo", "train", str(place.folder / "run.yaml")]
    line += ["--output_dir", str(out), *zero3(place), *more]
    return Run(line, out, {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})


@pytest.mark.slow
def test_under_a_users_own_launcher(place: Place, whole: Callable[[int], Path]) -> None:
    """The STOP file gives a committed checkpoint."""
    run = with_own_launcher(place, "own", *LONG)
    out = run.out
    assert run.until_step(20)
    (out / "STOP").touch()
    run.wait()
    run.until_nobody_is_left()
    assert not checkpoints(RunDir(out))[0].problem
    code, output = place.run_ranks("own", *zero3(place), *LONG)
    assert code == 0 and "resumed after step" in output and same_weights(out, whole(2)), output


@pytest.mark.slow
def test_what_sigterm_cannot_do_under_a_users_own_launcher(place: Place) -> None:
    """`deepspeed` ends at once and saves nothing. Ranks that are left alone end too: nobody would stop them."""
    more = ["--max_steps", "100000", "--save_steps", "10", "--save_total_limit", "2"]
    run = with_own_launcher(place, "own-term", *more)
    out = run.out
    assert run.until_step(30)
    run.process.send_signal(signal.SIGTERM)
    run.wait()
    for process in psutil.process_iter():  # launch.py outlives the runner, the ranks outlive neither it
        try:
            if str(out) in process.cmdline() and "deepspeed.launcher.launch" in " ".join(process.cmdline()):
                process.kill()
        except psutil.Error:
            continue
    run.until_nobody_is_left()
    assert not checkpoints(RunDir(out))[0].problem


@pytest.mark.slow
def test_two_jobs(place: Place) -> None:
    first = place.start("two", *zero3(place), "--max_steps", "100000")
    assert first.until_step(2)
    code, output = place.run_supervisor("two", *zero3(place), "--max_steps", "100000")
    assert code == 74 and str(first.process.pid) in output and "in use by dsdpo train" in output, output
    first.process.send_signal(signal.SIGTERM)
    assert first.wait()[0] == 75
    assert subprocess.run([sys.executable, "-m", "dsdpo", "checkpoints", str(first.out)], cwd=ROOT).returncode == 0


def test_a_gpu_that_is_full_is_72_with_what_to_lower(place: Place) -> None:
    """On one of two ranks, in its third micro-batch, with the shorter row as well; the other rank only loses its
    peer."""
    code, output = place.run("full", *zero3(place), ranks=2, DSDPO_FAULT="forward@3#1=oom")
    assert code == 72, output
    assert "The longest packed row is 128 tokens" in output and "lower max_length" in output
    assert "The longest packed row is 64 tokens" in output
