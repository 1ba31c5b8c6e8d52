#!/bin/sh
# make gpu-bench: from a built tree on a machine with a GPU, what it can do at most, and the table of what the cuda
# backend must reach, on made models, three runs. Arguments: the build folder; --all: 21b-a3b too (45 GB of disk below
# $TMPDIR, 60 GB of memory). Kernels by themselves: the information lines of gpu_check.
set -eu
build=$1
shapes=0.3b
[ "${2:-}" != --all ] || shapes=0.3b,21b-a3b
dir=$(mktemp -d "${TMPDIR:-/tmp}/ernest-gpu-XXXXXX")
trap 'rm -rf "$dir"' EXIT INT TERM
! "$build/ernest" collect-env | grep '^gpu: *none' || exit 1
"$build/gpu_limits"
for what in speed time; do
    "$build/gpu_check" "$what" >"$dir/kernels" || { cat "$dir/kernels"; exit 1; }
    sed -E '/^(ok |gpu_check)/d' "$dir/kernels"
done
python3 tools/gpu_table.py "$build" "$dir" --shapes "$shapes" --drop
