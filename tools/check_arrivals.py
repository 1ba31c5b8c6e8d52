#!/usr/bin/env python3
"""Arrivals at barriers in shared memory behind which loads of shared memory are still outstanding.

    python3 tools/check_arrivals.py build/release/ernest_cuda.so

A warp that says "this slot is free" before what it loaded from it is there may be overtaken by the copy engine, which
fills the slot anew: wrong numbers, once in hundreds of launches (docs/speed.md, "a slot that was filled too early";
bar_leave in cu_tensor.cuh). Neither the compiler nor compute-sanitizer tells. This reads the machine code of every
kernel (cuobjdump, of the CUDA toolkit) from top to bottom, loops twice: a load is there when an instruction has waited
for its scoreboard, or for that of a later load, since those of a warp come back in order. Prints each such arrival that
is not among the known ones below, and exits with 1 if there is one."""
import re
import shutil
import subprocess
import sys

# Kernels in which such arrivals were read and found harmless: how many at most, so that another one is told, and why.
KNOWN = {
    "a8_entry": (3, "scales and words that are written once"),
    "a8_large": (2, "loads of the slot that comes, not of the one that is left"),
    "wide_kernel": (1, "scales of 8-bit keys and values, which cp.async brings: a thread's store"),
    "moe_few": (1, "words that no copy writes"),
    "sample_kernel": (2, "numbers that threads write"),
    "stream_kernel": (1, "numbers that threads write"),
}
CODE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*/\* (0x[0-9a-f]{16}) \*/")
MORE = re.compile(r"\s+/\* (0x[0-9a-f]{16}) \*/")


def kernels(path):
    """(name, [(address, text, scoreboard that it sets or 7, scoreboards that it waits for as bits)])"""
    out = subprocess.run(["cuobjdump", "-sass", path], check=True, capture_output=True, text=True).stdout
    name, code, half = None, [], None
    for line in out.splitlines():
        if "Function :" in line:
            if name:
                yield name, code
            name, code = line.split(":")[1].strip(), []
        elif found := CODE.match(line):
            half = int(found[1], 16), found[2]
        elif half and (found := MORE.match(line)):
            control = int(found[1], 16) >> 41
            code.append((*half, control >> 5 & 7, control >> 11 & 63))
            half = None
    if name:
        yield name, code


def step(one, loads, found):
    address, text, _, waits = one
    for i in reversed(range(len(loads))):
        if loads[i][2] < 6 and waits >> loads[i][2] & 1:
            del loads[: i + 1]
            break
    op = re.sub(r"^@!?U?P\w+ ", "", text)
    if re.match(r"LDSM?\b", op) and not text.startswith("@!PT"):
        loads.append(one)
    if op.startswith("SYNCS.ARRIVE") and loads:
        found.setdefault(address, (text, [x[1] for x in loads]))


def arrivals(code):
    at, loads, found = {one[0]: i for i, one in enumerate(code)}, [], {}
    for i, one in enumerate(code):
        step(one, loads, found)
        back = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", one[1])
        if back and int(back[1], 16) in at and int(back[1], 16) < one[0]:
            again = list(loads)
            for other in code[at[int(back[1], 16)] : i + 1]:
                step(other, again, found)
    return found


def main():
    if not shutil.which("cuobjdump"):
        sys.exit("check_arrivals: cuobjdump is not in PATH; it comes with the CUDA toolkit")
    n_kernel = n_known = n_bad = 0
    for path in sys.argv[1:]:
        for name, code in kernels(path):
            n_kernel += 1
            found = arrivals(code)
            if len(found) <= sum(most for known, (most, _) in KNOWN.items() if f"{len(known)}{known}" in name):
                n_known += len(found)
                continue
            n_bad += len(found)
            for address, (text, loads) in found.items():
                print(f"{name} {address:#x}: {text} behind {len(loads)} loads, the last {loads[-1]}")
    print(f"check_arrivals: {n_kernel} kernels, {n_bad} arrivals behind loads, {n_known} known ones")
    return n_bad > 0 or n_kernel == 0


if __name__ == "__main__":
    sys.exit(main())
