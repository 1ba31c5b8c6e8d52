#!/usr/bin/env python3
"""Seconds from exec to the first byte of a reply, of `ernest complete` with a server of its own: start.py ERNEST MODEL [MODEL ...]

Weights in the page cache: the first start of each model is not counted. What is after the first byte, the server's end above all, is not
either."""
import os
import statistics
import subprocess
import sys
import threading
import time

ROUNDS, LIMIT_S = 10, 60


def start(ernest, model):
    begin = time.monotonic()
    args = [ernest, "complete", "-m", model, "-q", "What is a page table?", "--max-tokens", "1", "--temperature", "0"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
        limit = threading.Timer(LIMIT_S, p.kill)
        limit.start()
        first = os.read(p.stdout.fileno(), 1)
        seconds = time.monotonic() - begin
        p.stdout.read()
        limit.cancel()
    if not first or p.returncode != 0:
        sys.exit(f"{' '.join(args)}: no reply in {LIMIT_S} s")
    return seconds


def main():
    for model in sys.argv[2:]:
        s = [start(sys.argv[1], model) for _ in range(ROUNDS + 1)][1:]
        print(f"{model}: best {min(s):.3f} s, median {statistics.median(s):.3f}, worst {max(s):.3f}")


if __name__ == "__main__":
    main()
