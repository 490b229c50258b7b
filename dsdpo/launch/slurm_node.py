"""One node's part of a job under srun: this process becomes the node's `deepspeed` launcher.

srun starts it once a node. It says which GPUs the job has here, which the launcher would otherwise count from 0, and so
take a neighbour's.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

from dsdpo.errors import ConfigError
from dsdpo.launch.deepspeed import node_command
from dsdpo.runtime.env import node_rank, slurm_job
from dsdpo.runtime.rundir import RunDir


def main() -> None:
    """Never returns. Raises SystemExit where the node has fewer GPUs than ranks are wanted."""
    parser = argparse.ArgumentParser(prog="python -m dsdpo.launch.slurm_node", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True, help="of the job")
    parser.add_argument("--ranks", type=int, required=True, help="on each node")
    parser.add_argument("--master_addr", required=True)
    parser.add_argument("--master_port", required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="of the run")
    parser.add_argument("argv", nargs="+", help="of dsdpo on each rank")
    args = parser.parse_args()
    # A warning of the scheduler's that is sent to the steps too must not end the launcher; ranks handle it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    rank = node_rank()
    if rank > 0:
        _log_to(RunDir(args.output_dir).node_log(str(slurm_job()), socket.gethostname()))
    os.execv(sys.executable, launcher(args, rank, os.environ.get("CUDA_VISIBLE_DEVICES", "")))


def launcher(args: argparse.Namespace, rank: int, visible: str) -> list[str]:
    """The command line of this node's launcher.

    Args:
        rank: of the node.
        visible: CUDA_VISIBLE_DEVICES here.

    Raises:
        SystemExit: it names fewer GPUs than there are to be ranks.
    """
    ids = visible.split(",") if visible else [str(i) for i in range(args.ranks)]
    if len(ids) < args.ranks:
        print(
            f"{socket.gethostname()}: {args.ranks} ranks are wanted on each node, but SLURM gave {len(ids)} GPUs here "
            f"({visible}): ask for as many on all nodes, as with --gpus-per-node",
            file=sys.stderr,
        )
        raise SystemExit(ConfigError.exit_code)
    nodes = {f"node-{i}": ids[: args.ranks] for i in range(args.nodes)}
    return node_command(args.argv, nodes, rank, args.master_addr, args.master_port)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


if __name__ == "__main__":
    main()
