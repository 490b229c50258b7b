#!/usr/bin/env bash
# What a change must show on a GPU, in one call of at most 8 minutes:
#
#     bench/gpu_check.sh          on a machine with an NVIDIA GPU
#     bench/gpu_check.sh --cpu    tries the script itself: a tiny model, no GPU tests
#
# Parts: versions and card; the tests that need a GPU; the quick bench; a run that is killed and resumed. Each has a
# log and a time limit: the bench takes what the others leave of the 8 minutes. The exit code has a bit for each part
# that failed: 1 versions, 2 tests, 4 bench, 8 resume. Results go to $OUT, or to outputs/gpu_check. Whatever a part
# leaves running is ended with it.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda
case "${1:-}" in
    --cpu) device=cpu ;;
    "") ;;
    *) echo "usage: bench/gpu_check.sh [--cpu]" >&2; exit 64 ;;
esac

out=${OUT:-outputs/gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$device" = cpu ]; then export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=; fi

running=
# A part runs in a session of its own; dsdpo's launcher in another one, which the mark in its environment finds.
export GPU_CHECK_MARK="gpu_check-$$-$RANDOM"
end_part() {
    if [ -n "$running" ]; then kill -KILL -- "-$running" 2> /dev/null; fi
    running=
    local environment pid
    for environment in /proc/[0-9]*/environ; do
        pid=${environment#/proc/}
        pid=${pid%/environ}
        if [ "$pid" != $$ ] && grep -qzx "GPU_CHECK_MARK=$GPU_CHECK_MARK" "$environment" 2> /dev/null; then
            kill -KILL "$pid" 2> /dev/null
        fi
    done
}
trap 'end_part; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

failed=0
# part BIT NAME SECONDS COMMAND…
part() {
    local bit=$1 name=$2 limit=$3 began=$SECONDS code
    shift 3
    echo "== $name (at most $limit s)"
    setsid timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 &
    running=$!
    wait "$running"
    code=$?
    end_part
    tail -n "${TAIL:-25}" "$out/$name.log"
    case $code in
        0) echo "== $name: passed in $((SECONDS - began)) s" ;;
        124 | 137) echo "== $name: FAILED, not done in $limit s"; failed=$((failed | bit)) ;;
        *) echo "== $name: FAILED with $code after $((SECONDS - began)) s"; failed=$((failed | bit)) ;;
    esac
}

if [ "$device" = cuda ]; then
    part 1 versions 30 python -c '
import importlib.metadata, platform, torch
names = "torch deepspeed transformers peft trl liger-kernel bitsandbytes".split()
for name in names:
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
print("Python", platform.python_version(), "CUDA", torch.version.cuda)
memory = torch.cuda.get_device_properties(0).total_memory / 2**30
print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(0), f"{memory:.0f} GiB")'
    part 2 tests 120 python -m pytest -n 8 -q -m gpu -p no:cacheprovider tests
    resume=75
    left=$((480 - SECONDS - resume))
    TAIL=40 part 4 bench "$left" python bench/cuda_7b.py --quick --seconds "$((left - 30))" \
        --work "$work/bench" --json "$out/bench.json"
    part 8 resume "$resume" python -m bench.kill_and_resume --work "$work/resume"
else
    part 1 versions 60 python -c 'import torch, deepspeed, transformers; print(torch.__version__, deepspeed.__version__)'
    TAIL=40 part 4 bench 600 python bench/cuda_7b.py --quick --device cpu --work "$work/bench" --json "$out/bench.json" \
        --cases '7b-lora-*'
    part 8 resume 300 python -m bench.kill_and_resume --work "$work/resume" --device cpu
fi
if [ "$failed" = 0 ]; then echo "gpu_check: all parts passed in $SECONDS s"; else echo "gpu_check: FAILED, bits $failed"; fi
exit "$failed"
