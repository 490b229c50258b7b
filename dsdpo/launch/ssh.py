"""Many nodes without a scheduler: the hosts of a hostfile, looked at over ssh before the launcher starts, and an
environment for their ranks that no command line shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsdpo.errors import ConfigError, HangError, Problem, config_error
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir

_CONNECT_S, _CHECK_S = 15, 45
# Of this shell's environment, for ranks on other hosts. What else a login shell sets there stands.
_OF_HUBS = ("HF_", "HUGGING_FACE_", "MODELSCOPE_", "USE_HF", "USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB")
_OF_LIBRARIES = ("TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "MLFLOW_", "TENSORBOARD_")
_OF_TORCH = ("NCCL_", "TORCH_", "GLOO_", "OMP_", "CUDA_", "TRITON_", "DS_", "DSDPO_", "DEEPSPEED_", "UCX_", "PYTHON")
_NOT = ("CUDA_VISIBLE_DEVICES",)  # the launcher sets it on each host


def slots(hostfile: str, include: str | None, exclude: str | None) -> dict[str, list[int]]:
    """Hosts and their devices, as the `deepspeed` launcher reads a hostfile and its two filters. Raises ConfigError."""
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    try:
        pool = fetch_hostfile(hostfile)
        left = dict(parse_inclusion_exclusion(pool or {}, include or "", exclude or ""))
    except (ValueError, AssertionError) as error:
        raise config_error(
            "hostfile", "hostfile", f"--hostfile {hostfile}: {error}; its lines are `host slots=N`"
        ) from error
    if not left:
        text = f"--hostfile {hostfile}: --include and --exclude leave no host of {', '.join(pool or {})}"
        raise config_error("hostfile", "hostfile", text)
    return left


def check_hosts(hosts: list[str], config: str, output_dir: Path) -> None:
    """Try on each host, over ssh, what its ranks will need first.

    Args:
        hosts: names that ssh knows.
        config: path of the run config.
        output_dir: which exists here, and must exist there too: the hosts share a file system.

    Raises:
        HangError: a host cannot be reached.
        ConfigError: it lacks this folder, the config, output_dir, this Python or dsdpo; or pdsh is missing here; or
            this folder or Python has a name that the launcher cannot hand to a shell.
    """
    for path in (str(Path.cwd()), sys.executable):
        if not re.fullmatch(r"[\w@%+=:,./-]+", path):
            text = f"the deepspeed launcher hands {path} to the hosts' shells unquoted; use a plainer path"
            raise config_error("hosts", "hostfile", text)
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise config_error(
                "hosts", "hostfile", f"there is no {program} on PATH here, which --hostfile needs; install it"
            )
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        found = list(pool.map(lambda host: _check_host(host, config, output_dir), hosts))
    if away := [f"{host}: {told}" for host, (code, told) in zip(hosts, found) if code == HangError.exit_code]:
        raise HangError("\n".join(away))
    if lacking := [Problem("hosts", "hostfile", f"{host}: {told}") for host, (code, told) in zip(hosts, found) if code]:
        raise ConfigError(lacking)


def _check_host(host: str, config: str, output_dir: Path) -> tuple[int, str]:
    """Exit code, 0 if all is well, and what is wrong."""
    parts = (Path.cwd(), config, output_dir.absolute(), sys.executable)
    here, path, out, python = (shlex.quote(str(part)) for part in parts)
    checks = [
        (f"cd {here}", f"there is no folder {Path.cwd()}"),
        (f"test -r {path}", f"there is no file {config}"),
        (f"test -d {out}", f"there is no folder {output_dir}, which must be shared"),
        (f"test -x {python}", f"there is no {sys.executable}; install the same environment at the same place"),
        (f"{python} -m dsdpo --version > /dev/null", f"{sys.executable} cannot import dsdpo"),
    ]
    script = "; ".join(f"{check} || exit {101 + i}" for i, (check, _) in enumerate(checks))
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", host, script]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHECK_S, check=False
        )
    except subprocess.TimeoutExpired:
        return HangError.exit_code, f"no answer over ssh within {_CHECK_S} s"
    if done.returncode == 0:
        return 0, ""
    if 101 <= done.returncode < 101 + len(checks):
        said = done.stderr.strip().splitlines()[-1:]
        return ConfigError.exit_code, ": ".join([checks[done.returncode - 101][1], *said])
    said = done.stderr.strip().splitlines()[-1:] or [f"ssh ended with {done.returncode}"]
    return HangError.exit_code, f"cannot be reached: {said[0]}"


# --- the environment ---


def leave_environment(run_dir: RunDir, token: str, environment: Mapping[str, str]) -> None:
    """Write what ranks on other hosts need of this environment to a file that only its owner can read.

    The launcher would put it on ssh's command line, where every user of the hosts can read tokens.
    """
    forget_environment(run_dir)  # of a run that was killed
    wanted = [
        name for name in environment if name.startswith(_OF_HUBS + _OF_LIBRARIES + _OF_TORCH) and name not in _NOT
    ]
    passed = {name: environment[name] for name in wanted}
    before = os.umask(0o077)
    try:
        write_atomically(run_dir.environment(token), json.dumps(passed))
    finally:
        os.umask(before)


def take_environment(run_dir: RunDir, token: str) -> None:
    """Set what `leave_environment` wrote, on a rank, where this host has not set it already.

    A shell over ssh has the system's PATH, without this interpreter's ninja.
    """
    with suppress(FileNotFoundError):
        passed: dict[str, Any] = json.loads(run_dir.environment(token).read_text())
        for name, value in passed.items():
            os.environ.setdefault(name, value)
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def forget_environment(run_dir: RunDir) -> None:
    """Remove the file again."""
    for path in run_dir.environments():
        path.unlink(missing_ok=True)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """For the launcher itself, which exports some variables on command lines: without those that the file carries."""
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW")}
