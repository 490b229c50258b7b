"""What each rank finds on its node, and whether the nodes are alike: other code or another torch on one of them would
train something else, or hang."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dsdpo
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import ConfigError, DsdpoError
from dsdpo.runtime.env import Mesh

_PACKAGES = ("deepspeed", "torch", "transformers", "peft", "trl", "datasets", "tokenizers", "safetensors", "numpy")
_WITH_CUDA = ("bitsandbytes", "flash-attn", "triton")
_SHOWN = 12


class NodesDiffer(ConfigError):
    """What one node has and another has not, a line each."""

    what = "difference{s} between the nodes"


def facts(config: RunConfig | None, zero: ZeroConfig | None, trouble: DsdpoError | None = None) -> dict[str, Any]:
    """What JSON can hold of this rank's node.

    Args:
        config, zero: of the run; None where they could not be read.
        trouble: why this rank cannot begin.
    """
    found: dict[str, Any] = {"host": socket.gethostname(), "trouble": None}
    if trouble is not None:
        problems = [str(one) for one in trouble.problems] if isinstance(trouble, ConfigError) else [str(trouble)]
        found["trouble"] = [trouble.exit_code, problems]
    found["versions"] = {"python": platform.python_version(), **_versions()}
    found["code"] = _digests(Path(dsdpo.__file__).parent)
    if config is not None:
        found["config"] = config.model_dump(mode="json")
        found["files"] = {}
        if zero is not None and zero.path:
            found["files"]["deepspeed"] = hashlib.sha256(json.dumps(zero.raw, sort_keys=True).encode()).hexdigest()[:16]
        if (model := Path(config.model_name_or_path, "config.json")).is_file():
            found["files"]["model"] = _digest(model)
    found["devices"] = _devices()
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in (*_PACKAGES, *_WITH_CUDA):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*.py"))}


def _devices() -> list[list[Any]]:
    """Name and memory in GB of the CUDA devices that this rank sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [[device.name, round(device.total_memory / 1e9)] for device in seen]


def problems_of(everyone: Sequence[dict[str, Any]]) -> list[str]:
    """Why ranks cannot begin, by host, each reason once.

    Args:
        everyone: `facts` of all ranks, in their order.
    """
    found: dict[str, list[str]] = {}
    for rank in everyone:
        for problem in rank["trouble"][1] if rank["trouble"] else ():
            hosts = found.setdefault(problem, [])
            if rank["host"] not in hosts:
                hosts.append(rank["host"])
    return _few([f"{_hosts(hosts)}: {problem}" for problem, hosts in found.items()])


def differences(everyone: Sequence[dict[str, Any]]) -> list[str]:
    """In what nodes differ from rank 0's, a line for each thing and way to differ."""
    first = everyone[0]
    found: dict[str, list[str]] = {}
    for rank in everyone[1:]:
        for line in dict.fromkeys(_unlike(first, rank)):
            hosts = found.setdefault(line, [])
            if rank["host"] not in hosts:
                hosts.append(rank["host"])
    return _few([f"{_hosts(hosts)}: {line}" for line, hosts in found.items()])


def _unlike(first: dict[str, Any], rank: dict[str, Any]) -> list[str]:
    there = first["host"]
    lines = []
    for name, mine in first["versions"].items():
        if rank["versions"].get(name) != mine:
            lines.append(f"{name} is {rank['versions'].get(name)}, on {there} it is {mine}; install the same version")
    for name in sorted(first["code"].keys() | rank["code"].keys()):
        if rank["code"].get(name) != first["code"].get(name):
            lines.append(f"dsdpo/{name} is another file than on {there}; install the same dsdpo")
    ours, theirs = first.get("config") or {}, rank.get("config") or {}
    for name in sorted(ours.keys() | theirs.keys()) if ours and theirs else ():
        if ours.get(name) != theirs.get(name):
            lines.append(f"run config: {name} is {theirs.get(name)}, on {there} it is {ours.get(name)}")
    for name, mine in first.get("files", {}).items():
        if rank.get("files", {}).get(name) != mine:
            told = {"deepspeed": "the DeepSpeed JSON", "model": "the model's config.json"}[name]
            lines.append(f"{told} is missing, or another one than on {there}; copy it, or use a shared folder")
    return lines


def remarks(everyone: Sequence[dict[str, Any]]) -> list[str]:
    """What is worth knowing of devices that are not alike: it is no mistake, but the weakest one sets the pace."""
    kinds: dict[str, list[str]] = {}
    for rank in everyone:
        for name, memory in rank["devices"][:1]:
            hosts = kinds.setdefault(f"{name} ({memory} GB)", [])
            if rank["host"] not in hosts:
                hosts.append(rank["host"])
    found = []
    if len(kinds) > 1:
        told = "; ".join(f"{kind} on {_hosts(hosts)}" for kind, hosts in kinds.items())
        found.append(f"GPUs differ, and the slowest and smallest of them sets the pace: {told}")
    return found


def summary(everyone: Sequence[dict[str, Any]]) -> str:
    """Nodes and ranks in a line."""
    hosts = list(dict.fromkeys(rank["host"] for rank in everyone))
    devices = everyone[0]["devices"]
    kind = f" of {devices[0][0]}, {devices[0][1]} GB" if devices else " on CPUs"
    return f"{len(everyone)} ranks{kind}, on {len(hosts)} node{'s' if len(hosts) > 1 else ''}: {_hosts(hosts)}"


def missing(mesh: Mesh, came: Sequence[int], hosts: Sequence[str], seconds: float) -> str:
    """What to say of ranks that did not come.

    Args:
        came: ranks that did.
        hosts: of those.
    """
    absent = [rank for rank in range(mesh.world_size) if rank not in set(came)]
    told = ", ".join(map(str, absent[:_SHOWN])) + (" …" if len(absent) > _SHOWN else "")
    here = _hosts(list(dict.fromkeys(hosts)))
    return (
        f"rank{'s' if len(absent) > 1 else ''} {told} of {mesh.world_size} did not come within {seconds:.0f} s (those "
        f"on {here} did): their node is unreachable, or Python failed there or is slow to start. See their output; "
        "start_timeout in the run config waits longer"
    )


def _hosts(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:_SHOWN]) + (f" and {len(hosts) - _SHOWN} more" if len(hosts) > _SHOWN else "")


def _few(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"… and {len(lines) - _SHOWN} more"]
