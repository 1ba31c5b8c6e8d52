#!/bin/sh
# make bench: the machine's limits, the kernels, the steps of the models it has room for, a small server under load, each
# beside the others; on a machine that should be otherwise idle. About a quarter of an hour, and 2 GB of disk, 45 with
# BENCH_21B=1. Argument: the build folder.
#
# Every figure becomes a line of BENCH_CSV (bench/results.csv). BENCH_QUICK=1 only shows that all of it runs: tiny models,
# seconds, and the lines go to the build folder.
set -eu
cd "$(dirname "$0")/.."
build=$1
ernest=$build/ernest
models=build/models
quick=${BENCH_QUICK:+--quick}
csv=${BENCH_CSV:-bench/results.csv}
shapes="0.3b${BENCH_21B:+ 21b-a3b}"
prompts=16 in=256 out=128
[ -z "$quick" ] || csv=${BENCH_CSV:-$build/quick.csv} shapes="tiny-dense tiny-moe" in=32 out=8
commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
keep="--save-csv $csv --commit $commit"
mkdir -p "$models"

# The folder of a made model, written when it is not there.
made() {
    dir=$models/$1-$2
    [ -f "$dir/config.json" ] || "$ernest" make-model --shape "$1" --layout "$2" --out "$dir" >&2
    echo "$dir"
}

echo "commit $commit, $(date -u +%F)"
"$ernest" collect-env | grep -E '^(compiler|kernel|processor|level|processors|memory)'
echo "== limits"
"$ernest" bench limits $quick $keep
echo "== kernels"
"$ernest" bench kernels $quick $keep --rounds 3 --cpu-level auto
for shape in $shapes; do
    for layout in pt paddle; do
        [ "$shape-$layout" != 21b-a3b-paddle ] || continue # one copy of 44 GB is enough
        echo "== steps: $shape, $layout order"
        "$ernest" bench step --backend cpu --model "$(made "$shape" "$layout")" --table $quick $keep
    done
done
echo "== the engine alone"
cmake --build "$build" --target bench_sched >/dev/null
"$(find "$build" -name bench_sched -type f | head -n 1)"
shape=${shapes%% *}
model=$(made "$shape" pt)
echo "== the same work without a server, then with one: $prompts requests at once of $in + $out tokens"
"$ernest" bench step --backend cpu --model "$model" --batch "$prompts" --context "$in" --prompt 0 --job "$prompts,$in,$out" $quick $keep
fifo=$build/bench-ready
rm -f "$fifo"
mkfifo "$fifo"
# Prompts come again in each sweep: found in the cache, they would measure nothing.
"$ernest" serve --backend cpu --model "$model" --no-enable-prefix-caching --port 0 --max-num-seqs "$prompts" --ready-fd 3 --log-level warn 3>"$fifo" >/dev/null &
server=$!
trap 'kill $server 2>/dev/null || true; rm -f "$fifo"' EXIT
read -r url <"$fifo" || true
load="--base-url $url --random-input-len $in --random-output-len $out --ignore-eos --model $model $keep"
"$ernest" bench serve $load --num-prompts "$prompts" --sweep "$prompts,$prompts,$prompts"
echo "== a sweep of concurrencies"
"$ernest" bench serve $load --num-prompts $((2 * prompts)) --sweep 1,2,4,8,16 --plot "$build/bench-serve.svg"
kill "$server"
wait "$server" || true
echo "results: $csv, $build/bench-serve.svg"
