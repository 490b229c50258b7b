"""The cluster and the hosts that other tests stand on do what those tests take for granted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster import hosts as two_hosts
from tests.cluster import slurm as slurm_cluster
from tests.cluster.hosts import Hosts
from tests.cluster.machine import programs_in, until
from tests.cluster.slurm import Slurm
from tests.helpers.ranks import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Callable[..., str]:
    """Submits a script's text; returns the job's id."""

    def submit(script: str, *arguments: str, **variables: str) -> str:
        path = tmp_path / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        options = ["--open-mode=append", f"--output={tmp_path}/job-%j.log"]
        return slurm.sbatch(*options, *arguments, str(path), cwd=tmp_path, **variables)

    return submit


def processes_of(folder: Path) -> list[psutil.Process]:
    """All that use the cluster in `folder`."""
    found = psutil.process_iter(["environ"])
    return [process for process in found if f"{folder}/" in (process.info["environ"] or {}).get("SLURM_CONF", "")]


def test_a_job_completes_with_the_variables_of_the_one_who_submits(slurm, submit):
    job = submit("echo $WORD; type -p python", WORD="hello")
    assert slurm.wait(job)["ExitCode"] == "0:0"
    python = subprocess.run(["bash", "-c", "type -p python"], capture_output=True, text=True).stdout
    assert slurm.log(job) == f"hello\n{python}"


def test_a_jobs_exit_code_is_in_its_record(slurm, submit):
    job = submit("exit 64")
    assert slurm.wait(job, "FAILED")["ExitCode"] == "64:0"
    (record,) = (record for record in slurm.records() if record["JobId"] == job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "64:0")


def test_a_wait_for_a_job_that_fails_ends_with_its_log(slurm, submit):
    job = submit("echo what went wrong; exit 3")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)FAILED.*'3:0'.*what went wrong"):
        slurm.wait(job)


def test_two_nodes_have_names_gpus_and_processes_of_their_own(slurm, submit):
    ask = "echo $SLURM_PROCID $SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES $(pgrep -c slurmd$)"
    job = submit(f"srun bash -c '{ask}'", "--nodes=2", "--gpus-per-node=2")
    slurm.wait(job)
    assert sorted(slurm.log(job).splitlines()) == ["0 n1 n1 0,1 1", "1 n2 n2 0,1 1"]


def test_a_signal_reaches_the_batch_script(slurm, submit):
    job = submit("trap 'echo told; exit 0' USR1; echo ready; sleep 300 & wait")
    until(lambda: "ready" in slurm.log(job), "the job's trap")
    slurm.signal(job, "USR1")
    slurm.wait(job)
    assert "told" in slurm.log(job)


def test_a_requeued_job_runs_again_with_the_same_id(slurm, submit):
    job = submit('echo "run ${SLURM_RESTART_COUNT:-0}"; [ -n "$SLURM_RESTART_COUNT" ] || sleep 300')
    until(lambda: "run 0" in slurm.log(job), "the first run")
    slurm.requeue(job)
    assert slurm.wait(job)["Restarts"] == "1"
    assert "run 1" in slurm.log(job)


def test_an_urgent_job_takes_the_nodes_of_another_which_is_told_before(slurm, submit):
    on_signal = "trap 'echo told; scontrol requeue $SLURM_JOB_ID' USR1; echo ready"
    script = f"{on_signal}; [ $SLURM_RESTART_COUNT ] || sleep 300 & wait"
    whole = ["--nodes=4", "--exclusive"]
    job = submit(script, *whole, "--signal=B:USR1")
    until(lambda: "ready" in slurm.log(job), "the job's trap")
    slurm.wait(submit("true", *whole, "--partition=urgent"))
    assert slurm.wait(job)["Restarts"] == "1"
    assert slurm.log(job).count("told") == 1


def test_a_nodes_death_takes_all_of_its_processes(slurm, submit):
    job = submit("setsid env --ignore-environment sleep 4321 & srun sleep 4321", "--nodelist=n2")
    machine = slurm.machines["n2"]
    until(lambda: machine.run("pgrep", "--count", "sleep") == "3\n", "the job's processes")
    doomed = psutil.Process(machine.pid).children(recursive=True)
    slurm.kill_node("n2")
    assert not any(process.is_running() for process in doomed)
    slurm.start_node("n2")
    slurm.wait(job, "PENDING", "RUNNING")


def test_nothing_is_left_when_a_cluster_stops(tmp_path):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    before = psutil.Process().children(recursive=True)
    with Slurm(tmp_path) as cluster:
        cluster.wait(cluster.sbatch("--nodes=4", "--wrap", "srun sleep 300", cwd=tmp_path), "RUNNING")
        assert len(processes_of(tmp_path)) > 6
    assert processes_of(tmp_path) == []
    assert psutil.Process().children(recursive=True) == before


def test_nothing_is_left_when_the_tests_are_killed(tmp_path):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    code = (
        "import sys, time, pathlib; from tests.cluster.slurm import Slurm\n"
        "with Slurm(pathlib.Path(sys.argv[1])) as cluster:\n"
        "    cluster.wait(cluster.sbatch('--nodes=4', '--wrap', 'srun sleep 300', cwd=sys.argv[1]), 'RUNNING')\n"
        "    print('up', flush=True); time.sleep(300)"
    )
    tests = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert tests.stdout and tests.stdout.readline() == "up\n"
    all_of_it = psutil.Process(tests.pid).children(recursive=True)
    assert len(processes_of(tmp_path)) > 6
    os.kill(tests.pid, signal.SIGKILL)
    tests.wait()
    until(lambda: not processes_of(tmp_path) and not any(map(psutil.pid_exists, (p.pid for p in all_of_it))), "the end")


def test_ssh_leads_to_the_other_host_and_its_address(hosts):
    said = hosts["h1"].run("ssh", "h2", "hostname; echo $SSH_CONNECTION").split()
    assert (said[0], said[1], said[3]) == ("h2", hosts.address("h1"), hosts.address("h2"))
    assert hosts.address("h1") != hosts.address("h2")


def test_pdsh_reaches_all_hosts(hosts):
    assert sorted(hosts["h1"].run("pdsh", "-w", "h1,h2", "hostname").splitlines()) == ["h1: h1", "h2: h2"]


def test_ranks_on_two_hosts_reduce_with_gloo(hosts):
    code = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo'); total = torch.tensor([dist.get_rank() + 1.0])\n"
        "dist.all_reduce(total); print(total.item())"
    )
    join = {"MASTER_ADDR": "h1", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    ranks = [
        hosts[name].start(
            sys.executable, "-c", code, env={**hosts.environment, **join, "RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank, name in enumerate(hosts.names)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [b"3.0\n", b"3.0\n"]


def test_a_program_on_a_host_can_be_signalled_and_killed(hosts):
    sleep = hosts["h1"].start("sleep", "300")
    until(lambda: [p.name() for p in programs_in(sleep)] == ["sleep"], "sleep")
    programs_in(sleep)[0].send_signal(signal.SIGTERM)
    assert sleep.wait(60) == -signal.SIGTERM
    hosts["h1"].start("sleep", "400").kill()
    until(lambda: hosts["h1"].start("pgrep", "-f", "sleep 400", stdout=subprocess.DEVNULL).wait() == 1, "its end")


def test_pkill_and_shared_memory_stay_on_their_host(hosts):
    sleeps = {name: hosts[name].start("sleep", "4711") for name in hosts.names}
    until(lambda: all(p.name() == "sleep" for sleep in sleeps.values() for p in programs_in(sleep)), "both")
    hosts["h1"].run("pkill", "-f", "sleep 4711")
    assert sleeps["h1"].wait(60) == -signal.SIGTERM and sleeps["h2"].poll() is None
    hosts["h1"].run("touch", "/dev/shm/mine")
    assert hosts["h2"].run("ls", "/dev/shm") == ""


def test_a_host_without_its_cable_cannot_be_reached_until_it_is_back(hosts):
    ask = ["ssh", "-o", "ConnectTimeout=2", "h2", "hostname"]
    hosts.cut("h2")
    tried = hosts["h1"].start(*ask, stderr=subprocess.PIPE)
    assert b"timed out" in tried.communicate(timeout=60)[1] and tried.returncode == 255
    hosts.mend("h2")
    assert hosts["h1"].run(*ask) == "h2\n"


def test_a_changed_file_is_changed_on_one_host_alone(hosts, tmp_path):
    path = tmp_path / "code.py"
    path.write_text("print('old')\n")
    hosts["h2"].overlay(path, "print('new')\n")
    assert hosts["h1"].run("cat", str(path)) == path.read_text() == "print('old')\n"
    assert hosts["h1"].run("ssh", "h2", f"cat {path}") == "print('new')\n"


def test_two_sets_of_hosts_live_side_by_side_and_leave_nothing(tmp_path):
    if reason := two_hosts.missing():
        pytest.skip(reason)
    before = psutil.Process().children(recursive=True), devices_and_mounts()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with Hosts(tmp_path / "a") as a, Hosts(tmp_path / "b", ("x", "y", "z")) as b:
        for hosts in (a, b):
            hosts[hosts.names[0]].start("setsid", "sleep", "300")
        assert b["x"].run("ssh", "z", "hostname") == "z\n"
        everyone = psutil.Process().children(recursive=True)
    assert (psutil.Process().children(recursive=True), devices_and_mounts()) == before
    assert not any(process.is_running() for process in everyone if process not in before[0])


def devices_and_mounts() -> list[str]:
    """Network devices and mounts of this machine itself."""
    return [*sorted(os.listdir("/sys/class/net")), *Path("/proc/self/mountinfo").read_text().splitlines()]
