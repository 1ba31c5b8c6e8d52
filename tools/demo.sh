#!/bin/sh
# make demo: serve a small model and chat with it. Arguments: the ernest program, a model (a folder, or a name in models/).
set -eu
ernest=$1
model=$2

trained=
if [ -f "$model/config.json" ]; then
    dir=$model
elif [ -f "models/$model/config.json" ]; then
    dir=models/$model
    trained=1
else
    case $model in
    demo-dense) shape=tiny-dense ;;
    demo-moe) shape=tiny-moe ;;
    *) echo "demo: no model $model: neither a folder nor in models/; MODEL=demo-dense needs nothing" >&2; exit 2 ;;
    esac
    mkdir -p build/models
    dir=build/models/$shape
    [ -f "$dir/config.json" ] || "$ernest" make-model --shape "$shape" --out "$dir"
fi

work=$(mktemp -d /tmp/ernest-demo.XXXXXX)
server=
finish() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server" 2>/dev/null; } || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A session of its own: Ctrl-C in the chat stops an answer, not the server.
setsid "$ernest" serve --model "$dir" --port "${PORT:-0}" --ready-fd 9 --log-level warn 9>"$work/ready" >&2 &
server=$!
url=
while [ -z "$url" ]; do
    sleep 0.1
    url=$(cat "$work/ready")
    [ -n "$url" ] || kill -0 "$server" 2>/dev/null || { wait "$server" || exit $?; exit 1; }
done

echo
echo "Listening at $url/v1 (OpenAI's API). The model in $dir is a toy for trying the server."
[ -n "$trained" ] || [ "$dir" = "$model" ] || echo "Its weights are random, so its words are noise."
echo "To serve a real one: $ernest serve --model /path/to/ERNIE-4.5-0.3B-Paddle --max-model-len 32768"
echo
if [ -t 0 ] && [ -t 1 ]; then
    trap '' INT # the chat takes it
    "$ernest" chat --url "$url"
else
    echo "> Hello, who are you?"
    "$ernest" chat --url "$url" --max-tokens 48 -q "Hello, who are you?"
fi
