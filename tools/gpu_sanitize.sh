#!/bin/sh
# make gpu-sanitize: the kernels under NVIDIA's compute-sanitizer, from a built tree on a machine with a GPU and the CUDA
# toolkit. Every family of kernels by some small cases of gpu_check with few launches each, under memcheck, initcheck,
# synccheck and racecheck; and, first, what none of these sees, in the machine code (check_arrivals.py). Prints a line for
# each run as it ends, a report where it is not clean, and a count; exit code 1 if one was not clean. Arguments: the build
# folder; runs side by side (8); a word that "TOOL: CASES" has to hold.
#
# Left out, and counted: what a tool cannot follow.
#   no-sync   synccheck wants all warps of a block to meet their cluster in the same place; a8_split's asking warp meets it
#             in another one (barrier.cluster counts threads and allows that); cases whose rows come by way of it, too.
#   no-race   racecheck takes an arrival at an mbarrier for what its own thread has done. Where all lanes read or write,
#             meet (__syncwarp) and lane 0 arrives, it tells of the 31 others: few's lists and parts; x in the attention
#             half, in whose place joins put tiles; chain's slots, each time one is filled again (kernels that do the same
#             are clean where none is, or where a tensor copy fills it, which is not seen). It tells of threads that meet
#             at a named barrier when some of them were at another one and the rest were not: the attention half's tiles,
#             behind bands that one of two warpgroups has. (The attention half is clean once all lanes arrive and all meet
#             everywhere: docs/speed.md, eighth table.) And of a named barrier at which some only arrive (bar.arrive) it
#             loses track when they come again and have not waited with those who wait there in between: chain's sums,
#             decode's turns. Nor does it follow a wait without order and a fence behind it: sample's clusters.
# initcheck knows nothing of memory that gpu_check has poisoned: that a kernel reads such is seen by the poison, NaN.
set -u
build=$1
side=${2:-8}
word=${3:-}
PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer: not in PATH; it comes with the CUDA toolkit'; exit 1; }
! "$build/ernest" collect-env | grep '^gpu: *none' || exit 1
python3 tools/check_arrivals.py "$build/ernest_cuda.so" || exit 1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
export build dir

run='
left=$1 tool=$2 cases=$3
name="$tool: $cases"
log=$(mktemp "$dir/XXXXXX") || exit 255
began=$(date +%s)
case "$left $tool" in "no-sync synccheck" | "no-race racecheck")
    echo "left out  $name"
    : >"$log.left"
    exit
    ;;
esac
timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 86 "$build/gpu_check" "$cases" 7 briefly >"$log" 2>&1
code=$?
if [ $code -eq 0 ] && grep -q "^gpu_check: [1-9][0-9]* cases, 0 failed" "$log" &&
    grep -q "^=========.* SUMMARY: 0 " "$log"; then
    echo "clean     $name ($(($(date +%s) - began)) s)"
    : >"$log.clean"
else
    echo "NOT CLEAN $name: exit code $code
$(grep -E "^(FAIL|gpu_check:|=========)" "$log" | head -n 12)"
    : >"$log.bad"
fi'

for tool in memcheck initcheck synccheck racecheck; do
    while read -r left cases; do
        case "$tool: $cases" in *"$word"*) printf '%s\0%s\0%s\0' "$left" $tool "$cases" ;; esac
    done <<'X2'
all     pack int4 44 x 80
all     skinny bf16 store 44 x 80
all     skinny int8 swiglu 200 x 300
all     skinny int8, norm in front, 72 x 2560
all     experts bf16 down 80 x 44, 7 rows
all     experts fp8 up 44 x 80, 40 rows
no-race few int8 384 x 320, shared int8 640, 3 rows
all     mid bits int8 200 -> 4220 pairs
all     mid grouped fp8 44 -> 80
all     broad bits int8 3072 -> 1024
all     broad bits fp8 200 -> 80
all     large bits bf16 64 -> 168 pairs
all     large grouped int4 44 -> 80
all     fp8 rows 133 x 300
all     large bits fp8 by fp8 130 -> 17
all     large grouped int8 by int8 44 -> 80
no-sync a8 f8 skinny swiglu 44 x 80
no-sync a8 i8 skinny add 168 x 64
no-sync a8 f8 skinny swiglu, norm in front, 2150 x 640
no-sync a8 i8 skinny swiglu, norm in front, 4200 x 128
no-sync a8 i4 experts down 44 x 80, 9 rows, tiles of 8
no-sync a8 f8 experts up 44 x 80, 9 rows, tiles of 16
no-sync a8 f8 experts up 130 x 256, 1 rows
no-sync a8 i4 experts down 130 x 256, 1 rows
no-sync a8 i8 a chain of 512 x 384, 1 rows
all     route few 7 of 43, 1024, bias
all     route few 3 of 8, 80, bias
no-sync half i4, shared i8, 512 x 384, 1 rows
all     norm T 300 D 80
all     embed T 50 D 70
all     take rows of 50 x 70
all     route ragged parts
all     norm run T 37 K 4 D 128 i8
all     combine T 37 K 6
all     combine and norm T 2050 K 4 D 1284 f8
no-race attention rope, store and decode of uneven
all     attention a piece of a prompt C128 H20/4 P64 bf16
all     attention a mixture C128 H20/4 P64 bf16
no-race attention replies beside a piece C128 H20/4 P64 bf16
all     linear of format 5, then rope and store: C 64
no-race attention half int8 2 kv heads
no-race chain small int8 kv bf16
no-race sample V
X2
done | xargs -0 -n 3 -P "$side" sh -c "$run" run
status=$?
count() { find "$dir" -name "*$1" | wc -l; }
echo "gpu_sanitize: $(count .clean) clean, $(count .bad) not, $(count .left) left out"
[ $status -eq 0 ] || echo "gpu_sanitize: xargs ended with $status, so some did not run"
[ $status -eq 0 ] && [ "$(count .bad)" -eq 0 ] && [ "$(count .clean)" -gt 0 ]
