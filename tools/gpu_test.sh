#!/bin/sh
# make gpu-test: the programs that check the cuda backend, from a built tree on a machine with a GPU, without a compiler
# there, but with cmocka: kernels, the whole backend, the engine on it (preempted, swapped to host memory and disk, in
# crowds), and what other GPUs than those of 9.0 get. Prints what failed and each one's last line. Argument: the build
# folder.
# Nothing is left out: no device, or a program that is not there, is a failure. The checks of kernels run in PARTS
# processes side by side, for most of their time is the processor's.
set -u
build=$1
failed=0
gpu=$("$build/ernest" collect-env | grep '^gpu:') || exit 1
echo "$gpu"
all="gpu_check gpu_model"
case $gpu in
*none*) exit 1 ;;
*"compute capability 9.0"*) ;;
*) all= ;; # what the others have is built for this one alone
esac
PARTS=8
dir=$(mktemp -d)
log=$dir/log
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM

# All cases of gpu_check or gpu_check_sm80, and the sum of what the parts say.
in_parts() {
    part=0
    seed=$(date +%s)
    while [ $((part += 1)) -le $PARTS ]; do
        ("$build/$1" "" "$seed" $part/$PARTS >"$dir/$part" 2>&1; echo $? >"$dir/$part.code") &
    done
    wait
    cat "$dir"/[1-$PARTS]
    awk -v name="$1" -v parts=$PARTS -v seed="$seed" '/^gpu_check: [0-9]+ cases, / { n++; cases += $2; failed += $4 }
        END { printf "%s: %d cases, %d failed, %d of %d parts came to their end; seed %d\n", name, cases, failed, n, parts, seed
              exit n < parts || failed > 0 || cases == 0 }' "$dir"/[1-$PARTS] && ! cat "$dir"/*.code | grep -qv '^0$'
}

for program in $all 'test_engine_same cuda' 'test_cache_same cuda' gpu_check_sm80 sm80/gpu_model; do
    case $program in
    gpu_check*) in_parts $program >"$log" 2>&1 ;;
    *) "$build/"$program >"$log" 2>&1 ;;
    esac
    code=$?
    if [ $code -ne 0 ]; then
        failed=1
        grep -v '^ok ' "$log" | head -n 60
        echo "$program: exit code $code"
    fi
    tail -n 1 "$log"
done
exit $failed
