#!/usr/bin/env bash
# One sequence over several GPUs: attention and its transfers, a training step, tests, the longest sequence that trains.
#
#     benchmarks/parallel.sh results/h200x2 [GPUs] [commit] [minutes]
#
# The most important first; nothing begins after so many minutes. What one GPU makes of the same is in the same file, for
# the comparison. A case that fails ends its processes, after its row, and the next start goes on behind it; so does the
# same command where it was stopped.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/parallel.sh OUT [GPUS] [COMMIT] [MINUTES]}
gpus=${2:-2}
commit=${3:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
minutes=${4:-600}
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8
mkdir -p "$out"

left() { echo $((minutes * 60 - SECONDS)); }
tell() { echo "[$SECONDS s] $*" >&2; }

# Seconds at most, GPUs, grid, file: 0 if every case has a row, 75 if there is no time left, else how it failed.
bench() {
    local most=$1
    (($(left) > 10)) || { tell "no time left for $3 on $2"; return 75; }
    (($(left) > most)) || most=$(left)
    tell "$3 on $2, at most $most s"
    timeout --kill-after=5 "$most" python3 -m torch.distributed.run --standalone --nproc-per-node "$2" \
        -m openmoba.bench parallel --grid "$3" --out "$out/$4" --commit "$commit" 2>&1 | sed '/^\*\*\*/d;/OMP_NUM_THREADS/d'
}
# The same, begun anew behind a case that failed, a few times.
all() {
    for _ in 1 2 3 4; do
        bench "$@" && return
        [ $? = 75 ] && return
    done
}

rm -f "$out/smoke.csv"
bench 90 "$gpus" smoke smoke.csv || tell "THE SMALL CASES FAILED: see above"
all 100 1 attention parallel.csv
all 120 "$gpus" attention parallel.csv
all 180 "$gpus" step-512K parallel.csv

if (($(left) > 10)); then
    tell "tests"
    timeout --kill-after=5 "$(left)" python3 -m pytest tests/gpu/test_parallel_gpu.py -o addopts= -q -rfE --tb=short \
        -p no:cacheprovider 2>&1 | tee "$out/tests.txt" | tail -n 30
    failed=$?
else
    failed=75
fi

# The longest: a step of each length, from near the limit of 139 GiB on, until one does not fit.
climb() { # GPUs, lengths
    local n=$1
    for length in "${@:2}"; do
        bench 900 "$n" "step-$length" parallel.csv || return
    done
}
climb "$gpus" 1M 1280K 1408K 1536K 1664K 1792K 2M
climb 1 512K 640K 768K 896K 1M
for n in 1 "$gpus"; do
    all 900 "$n" headline parallel.csv
done
tell "done"
exit "$failed"
