#!/bin/bash
# Trains on the hosts of a hostfile (see hostfile.example), without a scheduler. All options of the deepspeed launcher
# that choose hosts hold: --include h1:0,1@h2, --exclude h3, --master_addr, --master_port.
#
# Over ssh, typed once, on any machine that reaches all hosts without a password (needs pdsh):
#
#   launch/many_nodes.sh --hostfile HOSTS RUN.yaml [--key value ...]
#
# Without ssh, typed on every host, with its number in the hostfile and the first host's address:
#
#   launch/many_nodes.sh --no_ssh --node_rank 0 --master_addr h1 --hostfile HOSTS RUN.yaml [--key value ...]
#   launch/many_nodes.sh --no_ssh --node_rank 1 --master_addr h1 --hostfile HOSTS RUN.yaml [--key value ...]
#
# This folder, RUN.yaml, the environment and output_dir must be at the same path on all hosts. Over ssh, Ctrl-C stops
# the run with a checkpoint; without ssh, `touch OUTPUT_DIR/STOP` does. The same command goes on from there.
set -euo pipefail

# The network, where NCCL and gloo pick the wrong one. Over ssh, these reach all hosts (as do HF_* and WANDB_*, through
# a file in output_dir that only you can read and that is removed at the end, never on a command line).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

if [[ " $* " != *" --no_ssh "* ]]; then
    exec dsdpo train "$@"
fi

# This host's own launcher: the launcher's options go to it, all others to dsdpo.
launcher=() rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        --no_ssh) launcher+=("$1") && shift ;;
        --hostfile | --include | --exclude | --node_rank | --master_addr | --master_port)
            launcher+=("$1" "${2:?$1 needs a value}") && shift 2
            ;;
        --hostfile=* | --include=* | --exclude=* | --node_rank=* | --master_addr=* | --master_port=*)
            launcher+=("$1") && shift
            ;;
        --num_accelerators | --num_accelerators=*)
            echo "many_nodes.sh: the hostfile's slots say how many GPUs to use on each host" >&2
            exit 64
            ;;
        *) rest+=("$1") && shift ;;
    esac
done
exec deepspeed --log_level critical --no_local_rank "${launcher[@]}" --module dsdpo train "${rest[@]}"
