#!/bin/sh
# Every C, C++ and CUDA file that git knows is as clang-format would write it. Argument: the clang-format program.
set -eu
cd "$(dirname "$0")/.."
git ls-files -z 'src/*.c' 'src/*.h' 'src/*.cc' 'src/*.cu' 'src/*.cuh' 'tests/*.c' 'tests/*.h' 'bench/*.c' 'bench/*.h' 'tools/*.c' |
    xargs -0 -r -n 8 -P 2 "${1:-clang-format}" --dry-run -Werror
