#!/bin/sh
# Run every fuzz target in a build folder for some seconds, several at once. Arguments: folder, seconds each, how many at
# once. Targets that meet bytes straight from the network or from a downloaded file get all the seconds, the others a
# third. A finding is kept below <folder>/findings, and a small one is printed so that a log alone replays it; exit code
# 1 when there is any.
set -eu
build=$1
seconds=$2
jobs=$3

# The last of a failed target's log without the fuzzer's own talk, what to replay, and one line that says it all.
tell() { # name, exit code
    log=$build/$1.log
    grep -avE '^(#[0-9]|INFO:|stat::|0x[0-9a-f]{2},|Shadow byte)|^(=>|  )0x[0-9a-f]+: |^  [A-Z][A-Za-z0-9 ]*: +[0-9a-f]{2} ?|in fuzzer::' \
        "$log" | tail -n 40 | cut -c 1-400
    why=$(awk '/libFuzzer: deadly signal/ && !/^SUMMARY/ && last !~ /^#/ { print last } { last = $0 }
        /^==[0-9]+==.*(ERROR|WARNING):|^ALARM:|^SUMMARY:|: runtime error:/ { print }' "$log" |
        head -n 3 | cut -c 1-300 | paste -s -d '|' | sed 's/|/ | /g')
    input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    if [ -f "$input" ] && [ "$(wc -c <"$input")" -lt 4096 ]; then
        echo "fuzz: $1: replay: echo $(base64 -w 0 "$input") | base64 -d >input; $build/$1 input"
    fi
    echo "fuzz: $1: FAILED with exit code $2: ${why:-$(tail -n 1 "$log" | cut -c 1-300)}; input: ${input:-none kept};" \
        "seed $(sed -n 's/^INFO: Seed: //p' "$log" | head -n 1)"
}

one() {
    target=$1
    name=$(basename "$target")
    case $name in
    fz_http_request | fz_request | fz_safetensors | fz_config | fz_chat | fz_stream_text) ;;
    *) seconds=$(((seconds + 2) / 3)) ;;
    esac
    mkdir -p "$build/corpus/$name" "$build/findings"
    seeds=
    [ ! -d "tests/fuzz/corpus/$name" ] || seeds=tests/fuzz/corpus/$name
    rc=0
    # shellcheck disable=SC2086 # seeds may be no word at all
    "$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$build/findings/$name-" "$build/corpus/$name" $seeds >"$build/$name.log" 2>&1 || rc=$?
    if [ "$rc" -eq 0 ]; then
        echo "fuzz: $name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$build/$name.log") inputs, nothing found"
    else
        tell "$name" "$rc" >"$build/$name.told" # whole, so that two targets' words do not mix
        cat "$build/$name.told"
        return 1
    fi
}

if [ "${4:-}" ]; then
    one "$4"
    exit
fi
count=0
for target in "$build"/fz_*; do
    [ -f "$target" ] && [ -x "$target" ] && count=$((count + 1))
done
[ "$count" -gt 0 ] || { echo "fuzz: no targets in $build" >&2; exit 1; }
rm -f "$build"/fz_*.told
echo "fuzz: $count targets, up to $seconds s each, $jobs at once"
rc=0
for target in "$build"/fz_*; do
    case $target in *.log) continue ;; esac
    [ -x "$target" ] && printf '%s\0' "$target"
done | xargs -0 -n 1 -P "$jobs" "$0" "$build" "$seconds" "$jobs" || rc=1
# What was found, once more where a log ends.
for told in "$build"/fz_*.told; do
    [ ! -f "$told" ] || grep '^fuzz: ' "$told"
done
exit $rc
