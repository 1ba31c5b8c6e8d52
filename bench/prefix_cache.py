#!/usr/bin/env python3
"""Time to first token of a prompt of 2,000 tokens that every request shares, and 20 of its own: computed, found in the pool,
in host memory, and on disk after a restart. And the wait between tokens of eight replies while prompts of 8,000 tokens come.

    bench/prefix_cache.py [ttft|itl] ERNEST MODEL [more flags of ernest serve]

Starts and stops its own server on a free port of loopback, and removes the folder that it gives to the disk tier."""
import json
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request


class Server:
    def __init__(self, ernest, model, flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [ernest, "serve", model, "--port", str(port), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=1).read()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"the server did not start: ernest serve {model} {' '.join(flags)}")
                time.sleep(0.05)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def complete(self, prompt, n, times=None):
        """Seconds to the first token, and the prompt tokens that were cached; the times of all tokens into times."""
        body = {"prompt": prompt, "max_tokens": n, "min_tokens": n, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        begin, first, cached = time.monotonic(), None, 0
        with urllib.request.urlopen(request, timeout=600) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                data = json.loads(line[6:])
                if data.get("choices"):
                    now = time.monotonic()
                    first = first or now - begin
                    if times is not None:
                        times.append(now)
                if data.get("usage"):
                    cached = (data["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return first, cached


def tokens(rng, n):
    return [rng.randrange(1000, 90000) for _ in range(n)]


def ttft(ernest, model, flags):
    rng = random.Random(5)
    shared = tokens(rng, 2000)
    folder = tempfile.mkdtemp(prefix="ernest-bench-")
    flags = ["--max-model-len", "4096", "--max-num-seqs", "8", "--num-gpu-blocks-override", "80", "--swap-space", "4",
             "--kvcache-storage-backend", "file", "--kvcache-storage-dir", folder, "--kvcache-storage-gb", "8", *flags]
    seen = {"cold": [], "pool": [], "host": [], "disk": []}
    try:
        server = Server(ernest, model, flags)
        server.complete(tokens(rng, 30), 4)
        for _ in range(3):
            seen["cold"].append(server.complete(tokens(rng, 2020), 4))
        server.complete(shared + tokens(rng, 20), 4)
        for _ in range(5):
            seen["pool"].append(server.complete(shared + tokens(rng, 20), 4))
        for _ in range(3):  # 80 blocks hold one of these and not the shared one beside them
            server.complete(tokens(rng, 3000), 4)
            server.complete(tokens(rng, 3000), 4)
            seen["host"].append(server.complete(shared + tokens(rng, 20), 4))
        server.stop()
        for _ in range(3):
            server = Server(ernest, model, flags)
            server.complete(tokens(rng, 30), 4)
            seen["disk"].append(server.complete(shared + tokens(rng, 20), 4))
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cold = statistics.median(t for t, _ in seen["cold"])
    for where, list_ in seen.items():
        slowest = max(t for t, _ in list_)
        print(f"{where:5} {len(list_)} times: slowest {slowest * 1e3:8.1f} ms, {cold / slowest:6.1f} x faster than cold; "
              f"cached tokens {sorted({c for _, c in list_})}")


def gaps(times):
    return sorted(b - a for t in times for a, b in zip(t, t[1:]))


def itl(ernest, model, flags):
    flags = ["--max-model-len", "9000", "--max-num-seqs", "16", *flags]
    server = Server(ernest, model, flags)
    rng = random.Random(6)
    n = 200
    for long_prompts in (0, 3):
        times = [[] for _ in range(8)]
        streams = [threading.Thread(target=server.complete, args=(tokens(rng, 64), n, t)) for t in times]
        for s in streams:
            s.start()
        while any(len(t) < 10 for t in times):
            time.sleep(0.01)
        begin = time.monotonic()
        longs = [threading.Thread(target=server.complete, args=(tokens(rng, 8000), 1)) for _ in range(long_prompts)]
        for s in longs:
            s.start()
        for s in streams:
            s.join()
        took = time.monotonic() - begin
        all_ = gaps([[x for x in t if x >= begin] for t in times])
        print(f"{long_prompts} prompts of 8,000 tokens beside 8 streams: p50 {all_[len(all_) // 2] * 1e3:7.1f} ms, "
              f"p99 {all_[len(all_) * 99 // 100] * 1e3:7.1f} ms, most {all_[-1] * 1e3:7.1f} ms, {took:.1f} s")
        if long_prompts:
            break
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in ("ttft", "itl"):
        sys.exit(__doc__)
    {"ttft": ttft, "itl": itl}[sys.argv[1]](sys.argv[2], sys.argv[3], sys.argv[4:])
