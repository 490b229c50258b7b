"""The ranks' first meeting: who came, from which host, and whether all are about to do the same.

It needs no process group, so that a node that is away, or differs, is told by name instead of by a collective that
times out half an hour later.
"""

from __future__ import annotations

import json
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import ConfigError, DsdpoError, HangError, IOFailure, Problem, config_error
from dsdpo.launch.node_info import NodesDiffer, differences, facts, missing, problems_of, remarks, summary
from dsdpo.runtime.env import Mesh, elastic_agent, set_rank_env
from dsdpo.runtime.lock import is_held_by
from dsdpo.runtime.rundir import RunDir

if TYPE_CHECKING:
    from torch.distributed import Store

_GRACE_S = 10.0  # that a rank waits longer for rank 0's answer than rank 0 for the ranks
_LOOK_S = 0.05
_FOLDER_PATIENCE_S = 30.0  # NFS remembers for a while that there was no such file
_DEFAULT_TIMEOUT_S = 45.0


class NoAnswer(HangError):
    """Rank 0 cannot be reached."""

    for_each_node = True


def rendezvous(
    mesh: Mesh, config: RunConfig | None, zero: ZeroConfig | None, trouble: DsdpoError | None, token: str | None
) -> Store | None:
    """Wait for all ranks and compare what they are about to do.

    Args:
        config, zero: as this rank has read them; None with `trouble`.
        trouble: why this rank, not rank 0, cannot begin.
        token: on rank 0, of the lock on output_dir.

    Returns:
        What must stay alive as long as the process: rank 0 serves the process group's meeting from it.

    Raises:
        HangError: ranks did not come, or rank 0 cannot be reached.
        IOFailure: the port is in use on rank 0's node.
        NodesDiffer: a node has other code, packages, settings or another output_dir.
        DsdpoError: `trouble` of a rank, on all of them.
    """
    address, port = set_rank_env(mesh)
    if mesh.world_size == 1:
        return None
    timeout = config.start_timeout if config else _DEFAULT_TIMEOUT_S
    try:
        store = _open(mesh, address, port, timeout)
    except NoAnswer:
        error = trouble or NoAnswer(_no_answer(mesh, address, port, timeout))
        error.for_each_node = True  # rank 0 will not tell it
        raise error from None
    if mesh.is_main:
        store.set("token", token or "")
        verdict = _verdict(store, mesh, facts(config, zero), timeout)
        store.set("verdict", json.dumps(verdict))
        _until(lambda: store.add("received", 0) >= len(verdict["came"]) - 1, _GRACE_S)
    else:
        found = facts(config, zero, trouble or _other_folder(config, _receive(store, "token", timeout)))
        store.set(f"facts/{mesh.rank}", json.dumps(found))
        verdict = json.loads(_receive(store, "verdict", timeout + _GRACE_S))
        store.add("received", 1)
    if verdict["code"]:
        raise _error(verdict["code"], verdict["problems"])
    for line in verdict["remarks"] if mesh.is_main else ():
        print(line, flush=True)
    return store


def _open(mesh: Mesh, address: str, port: int, timeout: float) -> Store:
    """The store at `address`, which rank 0 serves unless torchrun does. Raises NoAnswer, IOFailure."""
    from torch.distributed import PrefixStore, TCPStore

    attempt = elastic_agent()
    serves = mesh.is_main and attempt is None
    try:
        store = TCPStore(
            address,
            port,
            mesh.world_size,
            serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if not serves:
            raise NoAnswer(str(error)) from error
        raise IOFailure(
            f"port {port} of {socket.gethostname()}, where the ranks are to meet, cannot be used "
            f"({str(error).splitlines()[0][:200]}); choose another with --master_port or MASTER_PORT"
        ) from error
    return PrefixStore(f"dsdpo/{attempt or 0}", store)


def _no_answer(mesh: Mesh, address: str, port: int, timeout: float) -> str:
    return (
        f"rank {mesh.rank} on {socket.gethostname()} got no answer from rank 0 at {address}:{port} within "
        f"{timeout:.0f} s: that node is unreachable, a firewall closes the port, or rank 0 failed (see its output). "
        "MASTER_ADDR and MASTER_PORT name another address, start_timeout in the run config waits longer"
    )


def _other_folder(config: RunConfig | None, token: str) -> ConfigError | None:
    """That output_dir here is not the folder in which rank 0 holds the lock."""
    if config is None or not token:
        return None
    folder = Path(config.output_dir)
    if _until(lambda: is_held_by(RunDir(folder), token), min(_FOLDER_PATIENCE_S, config.start_timeout * 2 / 3)):
        return None
    text = (
        f"output_dir {folder.absolute()} is not the folder that rank 0 writes to; all nodes need one shared file system"
    )
    return config_error("shared-folder", "output_dir", text)


def _until(true: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _receive(store: Store, key: str, seconds: float) -> str:
    """A value that rank 0 sets. Raises NoAnswer."""
    try:
        store.wait([key], timedelta(seconds=seconds))
        return bytes(store.get(key)).decode()
    except RuntimeError as error:
        raise NoAnswer(
            f"{socket.gethostname()}: rank 0 went away before it said whether all ranks can begin; see its output"
        ) from error


def _verdict(store: Store, mesh: Mesh, mine: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Rank 0's answer to what all ranks have found."""
    keys = {rank: f"facts/{rank}" for rank in range(1, mesh.world_size)}
    _until(lambda: store.check(list(keys.values())), timeout)
    everyone = {0: mine, **{rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}}
    verdict: dict[str, Any] = {"code": 0, "problems": [], "remarks": [], "came": sorted(everyone)}
    found = list(everyone.values())
    if told := problems_of(found):
        code = next(rank["trouble"][0] for rank in found if rank["trouble"])
        return {**verdict, "code": code, "problems": told}
    if len(found) < mesh.world_size:
        hosts = [rank["host"] for rank in found]
        return {**verdict, "code": HangError.exit_code, "problems": [missing(mesh, verdict["came"], hosts, timeout)]}
    if told := differences(found):
        return {**verdict, "code": NodesDiffer.exit_code, "problems": told}
    return {**verdict, "remarks": [summary(found), *remarks(found)]}


def _error(code: int, problems: list[str]) -> DsdpoError:
    if code == NodesDiffer.exit_code:
        return NodesDiffer(Problem("nodes-differ", "", text) for text in problems)
    kinds = {kind.exit_code: kind for kind in DsdpoError.__subclasses__()}
    return kinds.get(code, DsdpoError)("\n".join(problems))
