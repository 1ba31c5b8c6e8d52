#!/bin/sh
# Install the Debian packages that ernest needs and this machine lacks. Arguments: sets of packages (build, test).
# Names what is missing before it installs; does nothing, and needs no network, when all is there. nvcc, for the cuda
# backend, is no Debian package and is not asked for: where it is not, that backend is not built.
set -eu

build="build-essential git cmake ninja-build pkg-config libmicrohttpd-dev libjansson-dev libsentencepiece-dev
libyaml-dev libxxhash-dev libcmocka-dev libcurl4-openssl-dev"
test="clang clang-format libclang-rt-14-dev python3 prometheus curl"

have() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null || true)" = installed ]; }

# A tool that is on PATH need not come from Debian.
node_is_new() {
    command -v node >/dev/null 2>&1 && command -v npm >/dev/null 2>&1 &&
        [ "$(node -p 'parseInt(process.versions.node)' 2>/dev/null || echo 0)" -ge 18 ]
}

if ! command -v dpkg-query >/dev/null 2>&1; then
    echo "deps: not a Debian system; please see that these are there: $build $test nodejs npm" >&2
    exit 0
fi

missing=
for set in "$@"; do
    case $set in
    build) list=$build ;;
    test)
        list=$test
        # npm brings hundreds of packages: only where a test has client libraries to install.
        if ! node_is_new && ls "$(dirname "$0")"/../tests/proto/*/package.json >/dev/null 2>&1; then
            list="$list nodejs npm"
        fi
        ;;
    *) echo "deps: no set named $set; there are build and test" >&2; exit 2 ;;
    esac
    for package in $list; do
        case $package in
        build-essential) command -v g++ >/dev/null 2>&1 && command -v make >/dev/null 2>&1 && continue ;;
        git | curl | python3) command -v "$package" >/dev/null 2>&1 && continue ;;
        prometheus) command -v promtool >/dev/null 2>&1 && continue ;;
        esac
        have "$package" || missing="$missing $package"
    done
done
[ -n "$missing" ] || exit 0

echo "deps: missing Debian packages:$missing"
as_root=
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "deps: neither root nor sudo; please run as root: apt-get install$missing" >&2
        exit 1
    fi
    as_root="sudo"
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # package names are words
$as_root apt-get update -q
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
