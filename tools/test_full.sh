#!/bin/sh
# The long goldens: full shapes against the vectors of tests/golden/vectors. Called by ctest (label long, `make test-full`).
#     tools/test_full.sh ERNEST GOLDEN_CHECK
# 0.3b needs 0.8 GB of disk and two minutes; 21b-a3b needs 44 GB of disk below $TMPDIR and 60 GB of free memory, and is left
# out, saying so, where they are not there.
set -eu
ernest=$1
check=$2
vectors=tests/golden/vectors
dir=$(mktemp -d "${TMPDIR:-/tmp}/ernest-full-XXXXXX")
trap 'rm -rf "$dir"' EXIT INT TERM

run_shape() {
    "$ernest" make-model --shape "$1" --layout pt --seed 7 --out "$dir/$1" >/dev/null
    "$check" --backend cpu --kv bf16 --model "$dir/$1" --vectors "$vectors/$1.json"
    "$check" --backend ref --kv f32 --model "$dir/$1" --vectors "$vectors/$1.json"
    "$check" --backend ref --kv bf16 --model "$dir/$1" --vectors "$vectors/$1.json"
    rm -rf "${dir:?}/$1"
}

run_shape 0.3b

memory_gb=$(awk '/^MemAvailable/ {print int($2 / 1000000)}' /proc/meminfo)
disk_gb=$(df -P -k "$dir" | awk 'NR == 2 {print int($4 / 1000000)}')
if [ "$memory_gb" -ge 60 ] && [ "$disk_gb" -ge 50 ]; then
    run_shape 21b-a3b
else
    echo "21b-a3b left out: it needs 60 GB of free memory and 50 GB of disk, here are $memory_gb GB and $disk_gb GB"
fi
