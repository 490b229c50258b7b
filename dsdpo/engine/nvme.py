"""The folder on each node's NVMe that holds the optimizer's state: made ready, large enough, and gone at the end."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from dsdpo.compat import can_swap
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import IOFailure, config_error
from dsdpo.plan.memory import swap_bytes
from dsdpo.plan.shape import ModelShape
from dsdpo.runtime.collectives import all_gather_object, raise_on_any_rank
from dsdpo.runtime.env import Mesh


def prepare_swap(zero: ZeroConfig, mesh: Mesh) -> None:
    """Remove what a killed run left on this node's NVMe, if the run uses it. A collective call.

    Raises:
        ConfigError: a node cannot use it.
    """
    folder = zero.nvme_path
    if folder is not None:
        raise_on_any_rank(lambda: _make_room(folder, mesh))


def _make_room(folder: Path, mesh: Mesh) -> None:
    node = socket.gethostname()
    if not folder.parent.is_dir():
        text = f"nvme_path: {node} has no folder {folder.parent}; make it, or name one that every node has"
        raise config_error("deepspeed-nvme", "deepspeed", text)
    if not can_swap():
        raise config_error(
            "deepspeed-nvme",
            "deepspeed",
            f"offload_optimizer.device is nvme, but {node} has no libaio with its headers (Debian: libaio-dev); "
            "install it, or set device to cpu",
        )
    if mesh.local_rank == 0:  # of several ranks, where srun gives each a GPU of its own
        shutil.rmtree(folder, ignore_errors=True)


def check_swap_room(model: torch.nn.Module, zero: ZeroConfig, mesh: Mesh) -> None:
    """Tell a disk that the optimizer's state would fill, before DeepSpeed begins to write it. A collective call.

    Raises:
        IOFailure: a node's disk is too small.
    """
    folder = zero.nvme_path
    if folder is None:
        return
    trained = ModelShape.from_module(model).trained
    node = socket.gethostname()
    here = all_gather_object(node).count(node)
    raise_on_any_rank(lambda: _check_room(folder.parent, node, swap_bytes(trained, mesh.world_size, here)))


def _check_room(disk: Path, node: str, needed: int) -> None:
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise IOFailure(
            f"nvme_path: the optimizer's state takes {needed / 2**30:.2f} GiB on {node}, but {disk} has "
            f"{free / 2**30:.2f} GiB free; free space, name another folder, or train on more nodes"
        )


@contextmanager
def swap_removed(zero: ZeroConfig, mesh: Mesh) -> Iterator[None]:
    """At the end, remove what this rank has on NVMe."""
    try:
        yield
    finally:
        folder = zero.nvme_path
        if folder is not None:
            own = folder / "zero_stage_3" / "optimizer" / f"rank{mesh.rank}"
            shutil.rmtree(own, ignore_errors=True)
            with suppress(OSError):  # the last rank of the node finds them empty
                for parent in (own.parent, own.parent.parent, folder):
                    parent.rmdir()
