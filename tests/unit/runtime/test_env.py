"""Rank discovery: each launcher's variables, and SLURM's with and without a step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsdpo.runtime.env import Allocation, Mesh, allocation, first_node, job_port, launched, node_address, set_rank_env

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "localhost",
}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n3"}
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
TASK = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "MASTER_")) or name in (*PLACE, "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, *groups: dict[str, str]) -> None:
    for group in groups:
        for name, value in group.items():
            monkeypatch.setenv(name, value)


def test_empty_variables_are_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, dict.fromkeys(PLACE, ""))
    assert launched() is None
    put(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2"})
    assert launched() == Mesh(1, 2, 0)


def test_data_and_sequence_parallel_ranks() -> None:
    mesh = [Mesh(rank, 6, rank, sp_size=2) for rank in range(6)]
    assert {(place.dp_size, place.sp_size) for place in mesh} == {(3, 2)}
    assert [(place.dp_rank, place.sp_rank) for place in mesh] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    plain = Mesh(3, 4, 1)
    assert (plain.dp_rank, plain.dp_size, plain.sp_rank, plain.sp_size) == (3, 4, 0, 1)


def test_started_plainly() -> None:
    assert launched() is None and allocation() is None


def test_a_launchers_word_goes_before_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, STEP, TASK, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"})
    assert launched() == Mesh(5, 8, 2)


def test_a_task_of_srun_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, STEP, TASK)
    assert launched() == Mesh(3, 4, 1) and allocation() is None


@pytest.mark.parametrize(("visible", "local"), [("0,1", 1), ("3", 0)])
def test_a_task_with_a_gpu_of_its_own_takes_that(monkeypatch: pytest.MonkeyPatch, visible: str, local: int) -> None:
    put(monkeypatch, STEP, TASK, {"CUDA_VISIBLE_DEVICES": visible})
    assert launched() == Mesh(3, 4, local)


def test_a_batch_script_is_no_rank_but_has_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, BATCH, TASK, {"SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "2"})
    assert launched() is None
    assert allocation() == Allocation("7", 2, "n[3-4]", 8, 2, "7", True)
    put(monkeypatch, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"})
    assert allocation() == Allocation("7", 2, "n[3-4]", 8, 2, "5_3", True)


@pytest.mark.parametrize(
    ("asked", "given", "gpus"),
    [("1", "8", 1), ("a100:2,h100:2", None, 4), (None, "8", 8), ("0", "0", 0), (None, "", None), (None, None, None)],
)
def test_gpus_of_a_job(monkeypatch: pytest.MonkeyPatch, asked: str | None, given: str | None, gpus: int | None) -> None:
    said = {"SLURM_GPUS_PER_NODE": asked, "SLURM_GPUS_ON_NODE": given}
    put(monkeypatch, BATCH, {name: value for name, value in said.items() if value is not None})
    job = allocation()
    assert job is not None and job.gpus_per_node == gpus


@pytest.mark.parametrize(
    ("said", "gpus"),
    [
        ("", None),
        ("TresPerNode=gres:gpu:8 X=1", 8),
        ("TresPerNode=gres/gpu:a100:4", 4),
        ("TresPerNode=gres:gpu:0", 0),
        ("TresPerNode=gres:gpu:2080ti:4", 4),
        ("TresPerNode=gres:gpu:3g.40gb:1", 1),
        ("TresPerNode=gres/gpu:a100-sxm4-80gb=4", 4),
        ("TresPerNode=gres:shard:7,gres:gpu:nvidia_a100_1g.5gb:2,gres:gpu:3090:1", 3),
        ("TresPerNode=gres:gpu:8(IDX:0-7)", 8),
        ("TresPerNode=gres/gpu", None),
        ("TresPerNode=gres:shard:7", None),
    ],
)
def test_gpus_of_an_interactive_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, gpus: int | None
) -> None:
    """Where the environment does not say, SLURM is asked."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho 'JobId=7 {said}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    put(monkeypatch, BATCH, {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    job = allocation()
    assert job is not None and job.gpus_per_node == gpus
    put(monkeypatch, {"SLURM_GPUS": "a100:6"})
    job = allocation()
    assert job is not None and job.gpus_per_node == 3


def test_gpus_by_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, BATCH, {"SLURM_JOB_GPUS": "0,1,5"})
    job = allocation()
    assert job is not None and job.gpus_per_node == 3


@pytest.mark.parametrize(("step", "has_nodes"), [("0", False), ("4294967290", True)])
def test_a_shell_inside_a_job_is_no_rank(monkeypatch: pytest.MonkeyPatch, step: str, has_nodes: bool) -> None:
    """`srun --pty bash` has one node's share; the shell that salloc opens has the job's nodes."""
    tasks = "1" if step == "0" else "16"  # salloc's shell says how many the job has
    put(monkeypatch, STEP, BATCH, {**TASK, "SLURM_PROCID": "0", "SLURM_NTASKS": tasks, "SLURM_STEP_ID": step})
    assert launched() is None
    assert (allocation() is not None) == has_nodes


def test_libraries_find_the_place_that_srun_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, STEP, TASK)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what set_rank_env sets is gone with the test
    address, port = set_rank_env(Mesh(3, 4, 1))
    assert (address, port) == ("localhost", job_port("7"))
    assert {name: os.environ[name] for name in PLACE} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
    }


def test_a_launchers_meeting_point_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, STEP, TASK, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4321"})
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert set_rank_env(Mesh(3, 4, 1)) == ("10.0.0.1", 4321)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("gpu[001-004,009],big1", "gpu001"),
        ("a-1,b-2", "a-1"),
        ("r[2,5]n[07-09]", "r2n07"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_name_that_nobody_knows_stays_itself() -> None:
    assert node_address("localhost") == "localhost"
    assert node_address("no-such-node.invalid") == "no-such-node.invalid"


def test_ports_are_a_jobs_own() -> None:
    ports = [job_port(str(job), str(step)) for job in range(700) for step in range(13)]
    assert len(set(ports)) == len(ports) and all(20000 <= port < 30000 for port in ports)
    assert 20000 <= job_port("4294967295", "4294967290") < 30000
