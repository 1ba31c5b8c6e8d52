#!/bin/sh
# nvcc.sh OBJECT NVCC ARGS...: run the compiler and show what it says. ptxas mentions in passing (C7511, C7518, C7520)
# when it makes a kernel's wgmma products run one after the other, a third of their speed: here that is an error.
object=$1
shift
said=$("$@" 2>&1)
code=$?
[ -z "$said" ] || printf '%s\n' "$said" >&2
case $said in
*"instructions are serialized"*)
    echo "nvcc.sh: a kernel's wgmma was serialised; see docs/speed.md, cuda, for what decides it" >&2
    code=1
    ;;
esac
[ $code -eq 0 ] || rm -f "$object"
exit $code
