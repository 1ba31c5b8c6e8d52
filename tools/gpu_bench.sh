#!/bin/sh
# make gpu-bench: steps of the cuda backend on made models, from a built tree on a machine with a GPU: decode at batches
# of 1 to 256 and prefill, for every format of weights, and a table of it at the end. Arguments: the build folder; --all
# runs 21b-a3b too (44 GB of disk below $TMPDIR, and of memory).
set -eu
ernest=$1/ernest
shapes=0.3b
[ "${2:-}" != --all ] || shapes="0.3b 21b-a3b"
failed=0
dir=$(mktemp -d "${TMPDIR:-/tmp}/ernest-gpu-XXXXXX")
trap 'rm -rf "$dir"' EXIT INT TERM

# shape, format, decode or prefill, flags: its rows, each with shape and format before it.
step() {
    shape=$1 format=$2 what=$3
    shift 3
    "$ernest" bench step --backend cuda --model "$dir/$shape" --quantization "$format" "$@" >"$dir/out" || {
        echo "gpu_bench: $shape $format $* failed" >&2
        failed=1
    }
    grep "^$what" "$dir/out" | sed "s/^/$(printf '%-8s %-15s' "$shape" "$format") /" | tee -a "$dir/table"
}

"$(dirname "$ernest")/gpu_limits"
"$ernest" collect-env | grep -E '^(ernest|gpu|processor):'
! "$ernest" collect-env | grep -q '^gpu: *none' || exit 1
for shape in $shapes; do
    "$ernest" make-model --shape "$shape" --layout pt --seed 7 --out "$dir/$shape" >/dev/null
    long=1,8,32,64,128,256
    [ "$shape" = 0.3b ] || long=1,8,32,64 # what the KV cache leaves room for beside bf16 weights
    for format in none wint8 wint4 block_wise_fp8; do
        step "$shape" "$format" decode --context 1024 --batch 1,8,32,64,128,256 --prompt 0
        step "$shape" "$format" decode --context 4096 --batch "$long" --prompt 0
        step "$shape" "$format" prefill --context 1024 --batch 1 --prompt 2048,8192 --max-num-batched-tokens 8192
    done
    rm -rf "${dir:?}/$shape"
done
echo
printf '%-8s %-15s %-28s %10s %10s %9s %9s %9s  %s\n' shape format step tokens/s ms MB GOP GB/s 'best round'
sort -s -k1,2 "$dir/table"
exit $failed
