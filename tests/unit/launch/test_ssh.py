"""A hostfile's hosts, and the environment that ranks on other hosts get."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from dsdpo.errors import ConfigError
from dsdpo.launch import ssh as hosts
from dsdpo.launch.ssh import (
    check_hosts,
    forget_environment,
    leave_environment,
    slots,
    take_environment,
    without_secrets,
)
from dsdpo.runtime.rundir import RunDir

SHELL = {
    "HF_TOKEN": "secret",
    "NCCL_SOCKET_IFNAME": "ib0",
    "MLFLOW_TRACKING_TOKEN": "secret",
    "CUDA_VISIBLE_DEVICES": "3",
    "HOME": "here",
    "PATH": "bin",
}


@pytest.fixture
def other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that are set, or not, where the ranks run."""
    monkeypatch.setattr(os, "environ", {"PATH": "usr", "NCCL_SOCKET_IFNAME": "eth0"})


def test_ranks_get_what_is_not_set_there(tmp_path: Path, other_host: None) -> None:
    leave_environment(RunDir(tmp_path), "t0k3n", SHELL)
    [file] = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    take_environment(RunDir(tmp_path), "another")
    assert "HF_TOKEN" not in os.environ
    take_environment(RunDir(tmp_path), "t0k3n")
    assert os.environ["HF_TOKEN"] == "secret" and os.environ["NCCL_SOCKET_IFNAME"] == "eth0"
    assert not {"CUDA_VISIBLE_DEVICES", "HOME"} & set(os.environ) and os.environ["PATH"].endswith(":usr")


def test_the_file_is_gone_afterwards_and_with_the_next_run(tmp_path: Path) -> None:
    leave_environment(RunDir(tmp_path), "killed", SHELL)
    leave_environment(RunDir(tmp_path), "next", SHELL)
    assert [path.name for path in tmp_path.iterdir()] == [".environment-next"]
    forget_environment(RunDir(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_launcher_exports_no_token() -> None:
    """It puts variables of some names on command lines."""
    assert "MLFLOW_TRACKING_TOKEN" not in without_secrets(SHELL)
    assert {"PATH", "NCCL_SOCKET_IFNAME"} < without_secrets(SHELL).keys()


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, {"h1": [0, 1], "h2": [0, 1]}),
        ("h1:1@h2", None, {"h1": [1], "h2": [0, 1]}),
        (None, "h1", {"h2": [0, 1]}),
    ],
)
def test_hosts_and_filters_are_the_launchers(
    tmp_path: Path, include: str | None, exclude: str | None, expected: dict[str, list[int]]
) -> None:
    (tmp_path / "hosts").write_text("# two hosts\nh1 slots=2\nh2 slots=2\n")
    assert slots(str(tmp_path / "hosts"), include, exclude) == expected


def test_filters_that_leave_no_host_are_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("h1 slots=2\nh2 slots=2\n")
    with pytest.raises(ConfigError, match="leave no host of h1, h2"):
        slots(str(tmp_path / "hosts"), None, "h1@h2")


def test_a_folder_that_a_shell_would_split_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "jürgen").mkdir()
    monkeypatch.setattr(shutil, "which", lambda _: "found")
    monkeypatch.setattr(hosts, "_check_host", lambda *_: (0, ""))
    monkeypatch.chdir(tmp_path / "jürgen")
    check_hosts(["h1"], "run.yaml", tmp_path)
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(ConfigError, match="a b to the hosts' shells unquoted"):
        check_hosts(["h1"], "run.yaml", tmp_path)


@pytest.mark.parametrize(("content", "include"), [("h1 gpus=2\n", None), ("h1 slots=2\n", "h9")])
def test_a_hostfile_that_cannot_be_read_is_a_config_error(tmp_path: Path, content: str, include: str | None) -> None:
    (tmp_path / "hosts").write_text(content)
    with pytest.raises(ConfigError, match="`host slots=N`"):
        slots(str(tmp_path / "hosts"), include, None)
