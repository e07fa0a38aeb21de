#!/usr/bin/env bash
# One sequence over several GPUs: tests, attention and its transfers, a training step, the longest sequence that trains.
#
#     benchmarks/parallel.sh results/h200x2 [GPUs] [commit]
#
# What one GPU makes of the same comes first, in the same file. The same command goes on where it was stopped.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/parallel.sh OUT [GPUS] [COMMIT]}
gpus=${2:-2}
commit=${3:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export PYTHONPATH=src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8
mkdir -p "$out"

python3 -m pytest tests/gpu/test_parallel_gpu.py -o addopts= -q -rfE --tb=short -p no:cacheprovider >"$out/tests.txt" 2>&1
failed=$?
tail -n 25 "$out/tests.txt"

on() { # GPUs, grid
    timeout 900 python3 -m torch.distributed.run --standalone --nproc-per-node "$1" \
        -m openmoba.bench parallel --grid "$2" --out "$out/parallel.csv" --commit "$commit"
}
for n in 1 "$gpus"; do
    # A case that fails ends all processes, after its row; the next start goes on behind it.
    on "$n" headline || on "$n" headline || on "$n" headline
done
# The longest: a step of each length until one does not fit.
for n in 1 "$gpus"; do
    for length in 256K 384K 512K 640K 768K 896K 1M 1280K 1536K 1792K 2M 2560K 3M 3584K 4M; do
        on "$n" "step-$length" || break
    done
done
exit "$failed"
