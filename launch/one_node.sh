#!/bin/bash
# Trains on this machine.
#
#   launch/one_node.sh RUN.yaml [--key value ...]
#   launch/one_node.sh --num_accelerators 4 RUN.yaml          the first 4 GPUs; CUDA_VISIBLE_DEVICES chooses others
#
# Stop it with Ctrl-C or kill: the step in flight ends, and a checkpoint is made. The same command goes on from there.
set -euo pipefail

# Threads of each rank for what runs on the CPU beside a GPU. Without GPUs dsdpo shares out the cores by itself.
# export OMP_NUM_THREADS=8

# Where GPUs hang (a wrong PCIe or NVLink set-up), these show and avoid the path at fault; they cost speed.
# export NCCL_DEBUG=INFO
# export NCCL_P2P_DISABLE=1

exec dsdpo train "$@"
