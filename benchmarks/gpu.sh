#!/usr/bin/env bash
# Everything that needs a GPU, the most important first: tests, then the benchmarks, each for a few minutes at most.
#
#     benchmarks/gpu.sh results/h200 [minutes per grid] [commit]
#
# Needs torch, Triton and pytest, not the package; training needs transformers as well. The same command goes on where it was stopped; with pytest-xdist the
# tests compile in parallel. It fails if a test does. `sanitize` as a fourth argument adds compute-sanitizer, which is slow.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [MINUTES] [COMMIT] [sanitize]}
minutes=${2:-2}
commit=${3:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1
mkdir -p "$out"

workers=$(python3 -c 'import os, xdist; print("-n", min(10, os.cpu_count()))' 2>/dev/null)
# shellcheck disable=SC2086
python3 -m pytest tests/gpu $workers -o addopts= -q -rfE --tb=short -p no:cacheprovider -p no:benchmark \
    >"$out/tests.txt" 2>&1
failed=$?
tail -n 25 "$out/tests.txt"

grid() {
    python3 -m openmoba.bench attention --grid "$1" --minutes "$minutes" --out "$out/$2" --commit "$commit" "${@:3}"
}
grid headline attention.csv
grid peers attention.csv --contenders moba given  # side by side, before the slow ones
python3 -m openmoba.bench decode --lengths 32768 131072 524288 --out "$out/decode.csv" --commit "$commit"
python3 -m openmoba.bench paged --out "$out/paged.csv" --commit "$commit"
grid short short.csv
grid peers attention.csv
if python3 -c 'import transformers' 2>/dev/null; then
    for name in headline graphed eager trainer longest; do
        python3 -m openmoba.bench training --grid "$name" --minutes "$minutes" --out "$out/training.csv" --commit "$commit"
    done
fi

if [ "${4:-}" = sanitize ]; then
    export PYTHONPATH=$PWD/src:$PWD/tests
    echo "commit $commit" | tee "$out/memcheck.txt" >"$out/racecheck.txt"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 tests/gpu/sanitize.py >>"$out/memcheck.txt"
    compute-sanitizer --tool racecheck python3 tests/gpu/sanitize.py >>"$out/racecheck.txt"
    tail -n 1 "$out/memcheck.txt" "$out/racecheck.txt"
fi
exit "$failed"
