"""The scripts in slurm/ on a real SLURM: what they promise of limits, preemption, dead nodes, mistakes and secrets."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from dsdpo.runtime.rundir import RunDir
from dsdpo.tools.shipped import write_files
from tests.cluster.machine import until
from tests.cluster.slurm import Slurm
from tests.faults.place import Place, losses, same_weights, weights
from tests.helpers.ranks import ROOT

SECRETS = {"HF_TOKEN": "hf_sEcReTtOkEn", "WANDB_API_KEY": "wAnDbSeCrEtKeY"}
# One thread for each of several ranks on this machine; a step long enough to be met in the middle.
QUIET = {"OMP_NUM_THREADS": "1", "DSDPO_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With the scripts as `dsdpo files` writes them: they need no checkout."""
    place = Place(tmp_path_factory.mktemp("jobs"))
    write_files(place.folder / "files")
    return place


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """A run on 2 ranks without a scheduler, which nothing interrupts."""
    code, output = place.run_ranks("whole", "--deepspeed", place.zero(3))
    assert code == 0, output
    return place.folder / "whole"


@pytest.fixture
def submit(slurm: Slurm, place: Place) -> Callable[..., str]:
    """`sbatch OPTIONS slurm/train.sbatch run.yaml --output_dir OUT ...`; returns the job's id."""

    def submit(out: str, *arguments: str, options: tuple[str, ...] = ("--nodes=2",), **variables: str) -> str:
        script = [str(place.folder / "files" / "slurm" / "train.sbatch"), str(place.folder / "run.yaml")]
        command = ["--gpus-per-node=1", *options, *script, "--output_dir", str(place.folder / out)]
        if "--deepspeed" not in arguments:
            command += ["--deepspeed", place.zero(3)]
        return slurm.sbatch(*command, *arguments, cwd=place.folder, **{**QUIET, "PYTHONPATH": str(ROOT), **variables})

    return submit


def records_of(slurm: Slurm, job: str) -> list[dict[str, str]]:
    return [record for record in slurm.records() if record["JobId"] == job]


def test_two_nodes_train_policy_and_reference_in_shares(slurm: Slurm, place: Place, submit: Callable[..., str]) -> None:
    """And what is secret in the environment is in no log, command line or file."""
    arguments = ["--finetuning_type", "full", "--reference", "live"]
    job = submit("two", *arguments, "--report_to", "tensorboard", DSDPO_FAULT="save:staged@2=12", **SECRETS)
    until_saving(place, "two", 6)
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    done = slurm.wait(job)
    assert sum("--supervised" in line for line in lines) >= 2  # launchers and ranks were seen
    for secret in SECRETS.values():
        assert not [line for line in lines if secret in line]
        files = [path for path in place.folder.rglob("*") if path.is_file()]
        assert len(files) > 20 and not [path for path in files if secret.encode() in path.read_bytes()]
        assert secret not in slurm.log(job)
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "0")
    log = slurm.log(job)
    assert "ZeRO stage 3, 2 ranks on cpu, fp32, 50 % of the parameters on a rank" in log
    assert "reference: a frozen engine, 50 % of the parameters on a rank" in log
    assert "2 ranks on CPUs, on 2 nodes: n1, n2" in log
    assert (place.folder / "two" / "logs" / f"{job}-n2.log").exists()
    code, output = place.run_ranks("one", "--deepspeed", place.zero(3), *arguments, ranks=1)
    assert code == 0, output
    np.testing.assert_allclose(losses(place.folder / "two"), losses(place.folder / "one"), rtol=1e-5)
    one, two = weights(place.folder / "one"), weights(place.folder / "two")
    assert all(np.allclose(two[name], one[name], atol=1e-5) for name in one)
    [record] = records_of(slurm, job)
    assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0")


def until_saving(place: Place, out: str, step: int) -> None:
    """Wait for the checkpoint in which DSDPO_FAULT holds the ranks."""
    folder = place.folder / out / "checkpoints" / f"step-{step:08d}.tmp"
    until(folder.exists, f"{folder} to be written", 300)


def resumed(log: str) -> list[int]:
    """Steps after which attempts went on."""
    return [int(step) for step in re.findall(r"resumed after step (\d+)", log)]


def test_before_the_time_limit_a_job_saves_and_comes_back(
    slurm: Slurm, place: Place, whole: Path, submit: Callable[..., str]
) -> None:
    # Its limit comes near while it holds in a save, however long the start took; SLURM looks every half minute.
    job = submit("limit", options=("--nodes=2", "--time=60", "--signal=B:USR1@180"), DSDPO_FAULT="save:staged@3=75")
    until_saving(place, "limit", 9)
    minutes = int(slurm.job(job)["RunTime"].split(":")[-2])
    slurm.limit(job, minutes + 3)
    until(lambda: "stopping after this step" in slurm.log(job), "the signal")
    slurm.limit(job, 60)  # the next attempt has all the time
    done = slurm.wait(job)
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1"), slurm.log(job)
    [step] = resumed(slurm.log(job))
    assert step in (10, 11), slurm.log(job)
    assert same_weights(place.folder / "limit", whole) and losses(place.folder / "limit") == losses(whole)


@pytest.mark.slow
def test_a_preempted_job_saves_and_comes_back(
    slurm: Slurm, place: Place, whole: Path, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("preempted", options=("--nodes=2", "--nodelist=n[1-2]"), DSDPO_FAULT="save:staged@3=15")
    until_saving(place, "preempted", 9)
    urgent = ["--partition=urgent", "--nodelist=n1", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=sleep 1"]
    slurm.wait(slurm.sbatch(*urgent))
    done = slurm.wait(job)
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1"), slurm.log(job)
    [step] = resumed(slurm.log(job))
    assert step in (10, 11) and same_weights(place.folder / "preempted", whole)


@pytest.mark.slow
def test_a_job_that_is_requeued_by_hand_goes_on(
    slurm: Slurm, place: Place, whole: Path, submit: Callable[..., str]
) -> None:
    job = submit("requeued", options=("--nodes=1", "--gpus-per-node=2"), DSDPO_FAULT="save:staged@3=15")
    until_saving(place, "requeued", 9)
    slurm.requeue(job)
    done = slurm.wait(job)
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1"), slurm.log(job)
    assert slurm.log(job).count("starting train on 2 GPUs on each of 1 node (n1)") == 2
    attempts = RunDir(place.folder / "requeued").attempts.read_text().splitlines()
    assert [json.loads(line)["code"] for line in attempts] == [75, 0], "it held in a save until SLURM killed it"
    [step] = resumed(slurm.log(job))
    assert step >= 6 and same_weights(place.folder / "requeued", whole)


@pytest.mark.slow
def test_a_controller_that_is_away_is_asked_again(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.sbatch("--wrap=sleep 600", cwd=tmp_path)
    slurm.wait(job, "RUNNING")
    put_back = f"print(_put_back(Allocation({job!r}, 1, 'n1', None, 0, {job!r}, True)))"
    line = [
        sys.executable,
        "-c",
        f"from dsdpo.runtime.env import Allocation; from dsdpo.launch.slurm import _put_back; {put_back}",
    ]
    with slurm.controller_away():
        asking = subprocess.Popen(line, cwd=ROOT, env=slurm.environment, text=True, stdout=subprocess.PIPE)
        time.sleep(25)  # `scontrol show job` gives up after 20
    said, _ = asking.communicate(timeout=200)
    assert said == "put back into the queue\n"
    until(lambda: slurm.job(job)["Restarts"] == "1", "its return")
    slurm.cancel(job)


@pytest.mark.slow
def test_fresh_is_done_once_and_not_forgotten(
    slurm: Slurm, place: Place, whole: Path, submit: Callable[..., str]
) -> None:
    """The first attempt finds output_dir in use; the second begins again; the third goes on with that."""
    other = place.start("fresh", "--deepspeed", place.zero(3), DSDPO_FAULT="save:staged@2=600")
    until_saving(place, "fresh", 6)
    job = submit("fresh", "--fresh", "--yes", DSDPO_FAULT="save:staged@3=15")
    until(lambda: slurm.job(job)["Restarts"] == "1", "the end of the first attempt")
    for _ in range(2):
        other.process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert other.wait()[0] == 130
    until_saving(place, "fresh", 9)
    slurm.requeue(job)
    done = slurm.wait(job)
    log = slurm.log(job)
    assert done["ExitCode"] == "0:0" and log.count("moved the earlier run to") == 1, log
    [step] = resumed(log)
    assert step >= 6 and same_weights(place.folder / "fresh", whole)


@pytest.mark.slow
def test_a_cancelled_job_stays_away(slurm: Slurm, place: Place, submit: Callable[..., str]) -> None:
    job = submit("cancelled", DSDPO_FAULT="save:staged@2=12")
    until_saving(place, "cancelled", 6)
    slurm.cancel(job)
    done = slurm.wait(job, "CANCELLED")
    until(lambda: not slurm.call("squeue", "--noheader"), "its end")
    assert slurm.job(job)["JobState"] == "CANCELLED" and done["Restarts"] == "0"


@pytest.mark.slow
def test_a_mistake_in_the_config_ends_the_job(slurm: Slurm, submit: Callable[..., str]) -> None:
    job = submit("mistake", "--beta", "-1")
    done = slurm.wait(job, "FAILED")
    assert (done["ExitCode"], done["Restarts"]) == ("64:0", "0") and "beta" in slurm.log(job)


@pytest.mark.slow
def test_a_job_that_fails_at_the_same_step_is_given_up(slurm: Slurm, place: Place, submit: Callable[..., str]) -> None:
    job = submit("loop", DSDPO_FAULT="save:staged@1#1")
    done = slurm.wait(job, "FAILED")
    assert (done["ExitCode"], done["Restarts"]) == ("71:0", "2"), slurm.log(job)
    assert "3 attempts of this job began at the beginning and ended without a new checkpoint" in slurm.log(job)
    assert [record["JobState"] for record in records_of(slurm, job)].count("FAILED") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("dead", "nodes"), [("n2", "2"), ("n1", "1-3")], ids=["any node", "the first node"])
def test_when_a_node_dies_the_job_goes_on_without_it(
    slurm: Slurm, place: Place, whole: Path, submit: Callable[..., str], dead: str, nodes: str
) -> None:
    """Without the first node, the lock of the attempt that died with it must expire before another one begins."""
    out = f"dead-{dead}"
    job = submit(out, options=(f"--nodes={nodes}",), DSDPO_FAULT="save:staged@3=15")
    until_saving(place, out, 9)
    slurm.kill_node(dead)
    done = slurm.wait(job)
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1"), slurm.log(job)
    log = slurm.log(job)
    first, second = re.findall(r"on each of (\d) nodes? \((\S+)\)", log)
    assert (first[0], first[1][0:4]) == (nodes[-1], "n[1-"), first
    if dead == "n1":
        assert int(second[0]) < 4 and "n1" not in second[1] and "[1-" not in second[1], second
        assert "this job may still run on n1" in log
    np.testing.assert_allclose(losses(place.folder / out), losses(whole), rtol=1e-4)


@pytest.mark.slow
def test_another_job_goes_on_with_more_nodes(
    slurm: Slurm, place: Place, whole: Path, submit: Callable[..., str]
) -> None:
    job = submit("more", options=("--nodes=1",), DSDPO_FAULT="save:staged@2=12")
    until_saving(place, "more", 6)
    slurm.cancel(job)
    slurm.wait(job, "CANCELLED")
    done = slurm.wait(submit("more", options=("--nodes=3",)))
    assert done["ExitCode"] == "0:0" and resumed(slurm.log(done["JobId"])), slurm.log(done["JobId"])
    np.testing.assert_allclose(losses(place.folder / "more"), losses(whole), rtol=1e-4)


@pytest.mark.slow
def test_plain_srun_starts_ranks_that_stop_and_go_on(slurm: Slurm, place: Place, whole: Path, tmp_path: Path) -> None:
    """Without train.sbatch: SLURM_PROCID makes a rank, and a signal to the step is one to all ranks."""
    train = [sys.executable, "-m", "dsdpo", "train", str(place.folder / "run.yaml"), "--deepspeed", place.zero(3)]
    line = shlex.join(["srun", "--ntasks=2", *train, "--output_dir", str(place.folder / "srun")])
    options = ["--nodes=2", "--ntasks=2", f"--output={tmp_path}/%j.log", f"--wrap={line}"]
    variables = {**QUIET, "PYTHONPATH": str(ROOT)}
    job = slurm.sbatch(*options, cwd=place.folder, **variables, DSDPO_FAULT="save:staged@2=12")
    until_saving(place, "srun", 6)
    slurm.signal(job, "USR1", batch=False)
    assert slurm.wait(job, "FAILED")["ExitCode"] == "75:0"
    job = slurm.sbatch(*options, cwd=place.folder, **variables)
    assert slurm.wait(job)["ExitCode"] == "0:0"
    assert "2 ranks on CPUs, on 2 nodes: n1, n2" in slurm.log(job) and resumed(slurm.log(job))
    assert same_weights(place.folder / "srun", whole) and losses(place.folder / "srun") == losses(whole)


@pytest.mark.slow
def test_a_sweep_runs_every_line_on_what_was_prepared(slurm: Slurm, place: Place) -> None:
    settings = {**QUIET, "PYTHONPATH": str(ROOT), "DSDPO_SWEEP_DIR": str(place.folder / "sweep")}
    (place.folder / "sweep.txt").write_text('--beta 0.2 --run_name "a b"\n--beta 0.3\n')
    scripts = place.folder / "files" / "slurm"
    prepare = [str(scripts / "prepare.sbatch"), str(place.folder / "run.yaml"), "--output_dir", "sweep/data"]
    first = slurm.sbatch("--cpus-per-task=2", "--mem=0", *prepare, cwd=place.folder, **settings)
    script = [str(scripts / "array.sbatch"), str(place.folder / "run.yaml"), str(place.folder / "sweep.txt")]
    options = [f"--dependency=afterok:{first}", "--array=1-2%1", "--gpus-per-node=1"]
    array = slurm.sbatch(*options, *script, cwd=place.folder, **settings, DSDPO_FAULT="save:staged@2=12")
    until_saving(place, "sweep/2", 6)
    slurm.signal(f"{array}_2", "USR1")
    slurm.wait(f"{array}_2")
    jobs = [slurm.job(f"{array}_{line}") for line in (1, 2)]
    assert [(job["JobState"], job["Restarts"]) for job in jobs] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    for line, beta in (("1", 0.2), ("2", 0.3)):
        config = yaml.safe_load((place.folder / "sweep" / line / "run_config.yaml").read_text())
        assert config["beta"] == beta and (place.folder / "sweep" / line / "COMPLETED").exists()
