"""`dsdpo train --hostfile` over ssh between hosts with addresses of their own, what it says of a host that is away or
differs, and every other launcher across hosts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from tests.cluster.hosts import Hosts
from tests.cluster.machine import programs_in, until
from tests.faults.place import Place, losses, same_weights, steps_done
from tests.helpers.ranks import ROOT, free_port

SECRETS = {"HF_TOKEN": "hf_sEcReTtOkEn", "WANDB_API_KEY": "wAnDbSeCrEtKeY", "MLFLOW_TRACKING_TOKEN": "mLfLoWsEcReT"}
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("hosts"))
    (place.folder / "hostfile").write_text("h1 slots=1\nh2 slots=1\n")
    return place


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """A run on 2 ranks of this machine."""
    code, output = place.run_ranks("whole", "--deepspeed", place.zero(3))
    assert code == 0, output
    return place.folder / "whole"


class Command:
    """Something typed on a host."""

    def __init__(self, hosts: Hosts, host: str, log: Path, *line: str, **variables: str) -> None:
        self._log = log
        environment = {**hosts.environment, **QUIET, "PYTHONPATH": str(ROOT), **variables}
        with log.open("w") as stream:
            self.process: subprocess.Popen[Any] = hosts[host].start(
                "env", "--default-signal=INT", *line, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        return self.process.wait(600)


def train(hosts: Hosts, place: Place, out: str, *arguments: str, **variables: str) -> Command:
    """`dsdpo train --hostfile HOSTS run.yaml`, typed on h1."""
    line = [sys.executable, "-m", "dsdpo", "train", str(place.folder / "run.yaml"), "--deepspeed", place.zero(3)]
    line += ["--hostfile", str(place.folder / "hostfile"), "--output_dir", str(place.folder / out), *arguments]
    return Command(hosts, "h1", place.folder / f"{out}.log", *line, **variables)


def test_two_hosts_train_and_secrets_stay_secret(hosts: Hosts, place: Place, whole: Path) -> None:
    name = "100%h of $HOME; (beta=0.1) 'a' \"b\" \\ `id` *"
    run = train(
        hosts,
        place,
        "two",
        "--run_name",
        name,
        "--default_system",
        "$0.1;%n",
        DSDPO_FAULT="save:staged@2=10",
        **SECRETS,
    )
    staged = place.folder / "two" / "checkpoints" / "step-00000006.tmp"
    until(lambda: staged.exists() or run.process.poll() is not None, "the second save", 300)
    processes = list(psutil.process_iter(["cmdline"]))
    assert run.wait() == 0, run.output
    assert "2 ranks on CPUs, on 2 nodes: h1, h2" in run.output
    np.testing.assert_allclose(losses(place.folder / "two"), losses(whole), rtol=1e-5)
    said = yaml.safe_load((place.folder / "two" / "run_config.yaml").read_text())
    assert said["run_name"] == name and said["default_system"] == "$0.1;%n"  # through two shells
    lines = [" ".join(process.info["cmdline"] or ()) for process in processes]
    assert sum("--supervised" in line for line in lines) >= 5  # pdsh, ssh, launchers and ranks were seen
    for secret in SECRETS.values():
        assert not [line for line in lines if secret in line]
        files = [path for path in place.folder.rglob("*") if path.is_file()]
        assert len(files) > 20 and not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_stop_request_reaches_all_hosts(hosts: Hosts, place: Place, whole: Path) -> None:
    run = train(hosts, place, "stopped", DSDPO_FAULT="save:staged@2=12")
    staged = place.folder / "stopped" / "checkpoints" / "step-00000006.tmp"
    until(lambda: staged.exists() or run.process.poll() is not None, "the second save", 300)
    programs_in(run.process)[0].send_signal(15)
    assert run.wait() == 75, run.output
    step = steps_done(place.folder / "stopped")
    assert 6 < step < 12
    again = train(hosts, place, "stopped")
    assert again.wait() == 0 and f"resumed after step {step}" in again.output, again.output
    assert same_weights(place.folder / "stopped", whole)


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_rank_on_any_host(hosts: Hosts, place: Place) -> None:
    run = train(hosts, place, "interrupted", "--hang_timeout", "20", DSDPO_FAULT="save:staged@1=240")
    staged = place.folder / "interrupted" / "checkpoints" / "step-00000003.tmp"
    until(lambda: staged.exists() or run.process.poll() is not None, "the first save", 300)
    for _ in range(2):
        programs_in(run.process)[0].send_signal(2)
        time.sleep(1)
    assert run.wait() == 130, run.output
    out = str(place.folder / "interrupted")

    def left() -> list[str]:
        return [str(p.info["cmdline"]) for p in psutil.process_iter(["cmdline"]) if out in (p.info["cmdline"] or ())]

    until(lambda: not left(), "the ranks to see that the lock is gone", 120)


@pytest.mark.slow
def test_an_unreachable_host_is_named(hosts: Hosts, place: Place) -> None:
    hosts.cut("h2")
    started = time.monotonic()
    run = train(hosts, place, "away")
    assert run.wait() == 71 and time.monotonic() - started < 100
    assert "h2: cannot be reached" in run.output or "h2: no answer over ssh" in run.output, run.output


@pytest.mark.slow
def test_a_file_that_differs_on_a_host_is_named(hosts: Hosts, place: Place) -> None:
    path = ROOT / "dsdpo" / "objectives" / "preference_losses.py"
    hosts["h2"].overlay(path, path.read_text() + "\n# changed\n")
    started = time.monotonic()
    run = train(hosts, place, "changed")
    assert run.wait() == 64 and time.monotonic() - started < 100, run.output
    assert "1. h2: dsdpo/objectives/preference_losses.py is another file than on h1; install" in run.output


@pytest.mark.slow
def test_a_config_that_is_missing_on_a_host_is_named(hosts: Hosts, place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "run.yaml").write_text((place.folder / "run.yaml").read_text())
    hosts["h2"].run("mount", "-t", "tmpfs", "none", str(folder))
    line = [
        sys.executable,
        "-m",
        "dsdpo",
        "train",
        str(folder / "run.yaml"),
        "--output_dir",
        str(place.folder / "lacks"),
    ]
    run = Command(hosts, "h1", tmp_path / "log", *line, "--hostfile", str(place.folder / "hostfile"))
    assert run.wait() == 64
    assert f"1. h2: there is no file {folder}/run.yaml" in run.output, run.output


@pytest.mark.slow
def test_one_host_of_a_hostfile_is_that_host(hosts: Hosts, place: Place) -> None:
    run = train(hosts, place, "other", "--include", "h2", "--max_steps", "2")
    assert run.wait() == 0 and "1 ranks on CPUs" not in run.output, run.output
    assert '"host": "h2"' in (place.folder / "other" / "ranks" / "rank-00000.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun", "accelerate"])
def test_every_launcher_gives_the_same_losses(hosts: Hosts, place: Place, whole: Path, launcher: str) -> None:
    port = str(free_port())
    task = ["train", str(place.folder / "run.yaml"), "--deepspeed", place.zero(3)]
    task += ["--output_dir", str(place.folder / launcher)]

    def line(rank: int) -> list[str]:
        node = ["--node_rank", str(rank), "--master_addr", "h1", "--master_port", port]
        if launcher == "no_ssh":
            script = str(ROOT / "launch" / "many_nodes.sh")
            return [script, "--no_ssh", *node, "--hostfile", str(place.folder / "hostfile"), *task[1:]]
        if launcher == "torchrun":
            return ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *node, "-m", "dsdpo", *task]
        machines = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
        machines += ["--main_process_ip", "h1", "--main_process_port", port]
        machines += ["--use_deepspeed", "--deepspeed_multinode_launcher", "standard"]
        return ["accelerate", "launch", *machines, "-m", "dsdpo", *task]

    folder = place.folder
    runs = [Command(hosts, f"h{rank + 1}", folder / f"{launcher}-{rank}.log", *line(rank)) for rank in (0, 1)]
    codes = [run.wait() for run in runs]
    assert codes == [0, 0], "\n".join(run.output for run in runs)
    np.testing.assert_allclose(losses(folder / launcher), losses(whole), rtol=1e-5)
