"""Where a run keeps state on NVMe: a node that cannot is told by name, and nothing stays behind."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from dsdpo.compat import can_swap
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.nvme import _check_room, _make_room, swap_removed
from dsdpo.errors import ConfigError, IOFailure
from dsdpo.runtime.env import Mesh


def test_a_node_without_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"nvme_path: {socket.gethostname()} has no folder {tmp_path}/disk;"):
        _make_room(tmp_path / "disk" / "dsdpo-0", Mesh(0, 1, 0))


@pytest.mark.skipif(not can_swap(), reason="libaio with its headers is not installed (libaio-dev)")
def test_what_a_killed_run_left_is_removed_once_per_node(tmp_path: Path) -> None:
    left = tmp_path / "dsdpo-0" / "zero_stage_3" / "optimizer" / "rank7"
    left.mkdir(parents=True)
    _make_room(tmp_path / "dsdpo-0", Mesh(1, 2, 1))
    assert left.is_dir()
    _make_room(tmp_path / "dsdpo-0", Mesh(0, 2, 0))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_with_its_node(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    _check_room(tmp_path, "n3", free // 2)
    with pytest.raises(IOFailure, match=f"takes .* GiB on n3, but {tmp_path} has .* GiB free"):
        _check_room(tmp_path, "n3", 2 * free)


def test_each_rank_removes_its_own_and_the_last_one_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "disk")}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": offload}}))
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", deepspeed=str(path))
    zero = ZeroConfig.load(config)
    folder = zero.nvme_path
    assert folder is not None
    files = [folder / "zero_stage_3" / "optimizer" / f"rank{rank}" / "0_7.tensor.swp" for rank in (0, 1)]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"state")
    with pytest.raises(ZeroDivisionError), swap_removed(zero, Mesh(0, 2, 0)):
        raise ZeroDivisionError
    assert not files[0].exists() and files[1].exists()
    with swap_removed(zero, Mesh(1, 2, 1)):
        pass
    assert list((tmp_path / "disk").iterdir()) == []
