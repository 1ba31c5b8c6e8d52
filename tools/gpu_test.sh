#!/bin/sh
# make gpu-test: the programs that check the cuda backend, from a built tree on a machine with a GPU, without a compiler
# there, but with cmocka: kernels, the whole backend, the engine on it (preempted, swapped to host memory and disk, in
# crowds), and what other GPUs than those of 9.0 get. Prints what failed and each one's last line. Argument: the build
# folder.
# Nothing is left out: no device, or a program that is not there, is a failure.
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
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for program in $all 'test_engine_same cuda' 'test_cache_same cuda' gpu_check_sm80 sm80/gpu_model; do
    "$build/"$program >"$log" 2>&1
    code=$?
    if [ $code -ne 0 ]; then
        failed=1
        grep -v '^ok ' "$log" | head -n 60
        echo "$program: exit code $code"
    fi
    tail -n 1 "$log"
done
exit $failed
