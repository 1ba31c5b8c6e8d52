"""What clients do to a server in numbers and in bad manners: crowds, slow readers, hang-ups at any byte, half-closed and
pipelined connections. Each time the others are served as if alone and every page, place and descriptor comes back."""
import asyncio
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import struct
import sys
import threading
import time
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli"))
import harness  # noqa: E402

SEED = int(os.environ.get("ERNEST_TEST_SEED") or time.time())
CROWD = 64
CONTEXT = 8192
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
server = None


# ---- a plain client ----------------------------------------------------------------------------------------------

def address():
    parts = urllib.parse.urlparse(server.url)
    return parts.hostname, parts.port


def request_bytes(path, body, close=True):
    data = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n{'Connection: close' + chr(13) + chr(10) if close else ''}\r\n").encode() + data


def unchunk(data):
    """The body of a chunked answer."""
    head, _, rest = data.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    out = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        n = int(size, 16)
        if n == 0:
            break
        out, rest = out + rest[:n], rest[n + 2:]
    return out


def read_all(sock):
    out = bytearray()
    while True:
        piece = sock.recv(1 << 20)
        if not piece:
            return bytes(out)
        out += piece


def ask(path, body, timeout=120):
    with socket.create_connection(address(), timeout=timeout) as s:
        s.sendall(request_bytes(path, body))
        return read_all(s)


def meaning(data):
    """Everything an answer says, by choice, but when it was said, what it is called and how much of it was cached."""
    assert data.startswith(b"HTTP/1.1 200"), data[:300]
    text = re.sub(r'"(id|created|arrival_time|cached_tokens)":("[^"]*"|[0-9.]+),?', "", unchunk(data).decode())
    events = [e for e in text.split("\n\n") if e != ": ping"]
    # Each choice's events are in order; how the choices mix is up to the scheduler.
    return sorted(events, key=lambda e: int((re.search(r'"choices":\[{"index":(\d+)', e) or [0, 99])[1]))


def metrics():
    text = server.get("/metrics")[1]
    return {m[1]: float(m[2]) for m in re.finditer(r"^fastdeploy:(\w+) ([0-9.e+-]+)$", text, re.M)}


def state():
    """What must be as before when nobody is served: requests, pages, descriptors."""
    m = metrics()
    fds = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    active = json.loads(server.get("/v1/load")[1])["active_requests"]
    return {"running": m["num_requests_running"], "waiting": m["num_requests_waiting"], "parked": m["num_requests_parked"],
            "pages": m["available_gpu_block_num"], "active": active, "fds": fds}


def at_rest(seconds=60):
    """The state when nobody is served any more: the counters follow an answer by a moment."""
    until = time.monotonic() + seconds * harness.SLOW
    while any((now := state())[k] for k in ("running", "waiting", "parked", "active")):
        assert time.monotonic() < until, f"never at rest: {now}"
        time.sleep(0.02)
    return now


def back_to(before, seconds=60):
    """Wait until nothing changes any more and nothing more is held than before."""
    until, last = time.monotonic() + seconds * harness.SLOW, None
    while True:
        now = state()
        if now == last and all(now[k] >= before[k] if k == "pages" else now[k] <= before[k] for k in now):
            return
        assert time.monotonic() < until, f"still {now}, was {before}"
        last = now
        time.sleep(0.02)


def rss_kib():
    with open(f"/proc/{server.process.pid}/status", encoding="ascii") as f:
        return int(re.search(r"VmRSS:\s+(\d+)", f.read())[1])


def wait_for(what, seconds=100):
    until = time.monotonic() + seconds * harness.SLOW
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


# ---- crowds ------------------------------------------------------------------------------------------------------

def crowd_bodies(rng):
    for i in range(CROWD):
        body = {"max_tokens": rng.randrange(20, 160), "seed": rng.randrange(1 << 40), "stream": i % 4 != 3,
                "temperature": rng.choice([0, 0.7, 1.3, 2]), "top_p": rng.choice([0.5, 0.9, 1]), "ignore_eos": True}
        if rng.random() < 0.4:
            body["frequency_penalty"] = 1.5
        if i % 2:
            yield CHAT, {**body, "messages": [{"role": "user", "content": f"Hello {i} " * rng.randrange(1, 90)}],
                         "logprobs": True, "top_logprobs": 2, "stop": ["word", "the"]}
        else:
            yield TEXT, {**body, "prompt": f"{i} is a number. " * rng.randrange(1, 90), "logprobs": 1, "n": 1 + i % 3,
                         "echo": i % 8 == 0}


def watch_health(where, stop, answer):
    """The milliseconds of each answer of /health, and by how much each nap of 5 ms was longer; the last odd answer."""
    ms, late, odd = [], [], None
    with socket.create_connection(where, timeout=120) as s:
        while not ms or not stop.is_set():
            begin = time.monotonic()
            s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            got = s.recv(65536)
            end = time.monotonic()
            ms.append(1000 * (end - begin))
            if not got.startswith(b"HTTP/1.1 200"):
                odd = got
            time.sleep(0.005)
            late.append(1000 * (time.monotonic() - end) - 5)
    answer.send((ms, late, odd))


class HealthWatch:
    """Asks /health all the while, from a process of its own, so that it waits for the server and not for this one."""

    def __init__(self):
        fork = multiprocessing.get_context("fork")
        self.stop, (self.answer, end) = fork.Event(), fork.Pipe()
        self.process = fork.Process(target=watch_health, args=(address(), self.stop, end), daemon=True)
        self.ms = []

    def __enter__(self):
        self.process.start()
        return self

    def __exit__(self, kind, *_):
        self.stop.set()
        self.ms, late, odd = self.answer.recv()
        self.process.join()
        # The bound is on the server's path. What a busy machine adds is seen in the watcher's own naps.
        allowed = 100 * harness.SLOW + 10 * statistics.median(late)
        assert odd is None, odd
        assert statistics.median(self.ms) < allowed, f"median {statistics.median(self.ms):.1f} ms, allowed {allowed:.1f}"


async def ask_async(path, body):
    reader, writer = await asyncio.open_connection(*address(), limit=1 << 24)
    writer.write(request_bytes(path, body))
    data = await reader.read(-1)
    writer.close()
    return data


def sixty_four_at_once_say_what_each_says_alone():
    bodies = list(crowd_bodies(random.Random(SEED)))
    alone = [meaning(ask(*b)) for b in bodies]
    before = at_rest()

    async def together():
        return await asyncio.gather(*(ask_async(*b) for b in bodies))

    with HealthWatch() as health:
        for _ in range(2):
            crowd = [meaning(data) for data in asyncio.run(together())]
            for b, one, many in zip(bodies, alone, crowd):
                assert one == many, f"not the same in a crowd: {b[0]} {json.dumps(b[1])[:300]}"
    back_to(before)
    print(f"        /health: median {statistics.median(health.ms):.1f} ms, worst {max(health.ms):.1f} ms of {len(health.ms)}")


# ---- slow readers ------------------------------------------------------------------------------------------------

LONG = {"prompt": "Hello", "max_tokens": 5000, "ignore_eos": True, "seed": 3, "stream": True}


def small_socket():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.settimeout(120)
    s.connect(address())
    return s


def a_slow_reader_is_parked_bounded_and_served_in_full():
    want = meaning(ask(TEXT, LONG))
    before = at_rest()
    rss = rss_kib()
    with small_socket() as slow:
        slow.sendall(request_bytes(TEXT, LONG))
        got = bytearray()

        def waits():  # one byte a look: too slow for anything
            got.extend(slow.recv(1))
            return metrics()["num_requests_parked"] == 1

        wait_for(waits)
        assert ask(TEXT, {"prompt": "x", "max_tokens": 5}).startswith(b"HTTP/1.1 200")
        assert metrics()["num_requests_parked"] == 1, "another request had to wait for the slow one"
        grown = rss_kib() - rss
        assert grown < 4096 or harness.SLOW > 1, f"{grown} KiB more for one slow reader"
        got += read_all(slow)
    assert meaning(bytes(got)) == want, "the slow reader's text is not the text"
    back_to(before)


def many_who_never_read_cost_little_and_disturb_nobody():
    n = 40
    before = at_rest()
    rss = rss_kib()
    body = {"prompt": "x", "max_tokens": 40}
    want = meaning(ask(TEXT, {**body, "seed": 1}))
    silent = [small_socket() for _ in range(n)]
    for i, s in enumerate(silent):
        s.sendall(request_bytes(TEXT, {**LONG, "seed": i, "logprobs": 20}))  # long events: soon parked
    wait_for(lambda: metrics()["num_requests_parked"] == n)
    with HealthWatch():
        for _ in range(10):
            assert meaning(ask(TEXT, {**body, "seed": 1})) == want
    # A stream's buffer may hold 64 KiB, then at most 256 more tokens of 2 KiB; each request has its own arenas. (A
    # sanitizer keeps what was freed, so there the resident size says nothing.)
    grown = rss_kib() - rss
    assert grown < n * 1024 or harness.SLOW > 1, f"{grown} KiB for {n} silent readers"
    for s in silent:
        s.close()
    back_to(before)
    print(f"        {grown // n} KiB for each silent reader")


# ---- hang-ups ----------------------------------------------------------------------------------------------------

def one_hang_up(rng):
    """Open, send, perhaps read, and leave at a random byte."""
    n_token = rng.choice([1, 30, 3000])
    body = {"max_tokens": n_token, "stream": rng.random() < 0.6, "ignore_eos": True, "n": rng.choice([1, 1, 3])}
    path = rng.choice([CHAT, TEXT])
    text = "Hello " * rng.randrange(1, 200)
    data = request_bytes(path, {**body, **({"prompt": text} if path == TEXT else
                                           {"messages": [{"role": "user", "content": text}]})})
    with socket.create_connection(address(), timeout=60) as s:
        if rng.random() < 0.5:  # a reset instead of a proper end
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if rng.random() < 0.35:
            s.sendall(data[:rng.randrange(len(data))])
            time.sleep(rng.choice([0, 0.002]))
            return
        s.sendall(data)
        left = rng.choice([0, 1, 100, 400, 3000, 30000])
        if body["stream"]:
            while left > 0:
                piece = s.recv(left)
                if not piece:
                    return
                left -= len(piece)
        time.sleep(rng.random() * 0.02)


def hang_ups_at_any_byte_lose_nothing():
    rng = random.Random(SEED + 1)
    before = at_rest()
    seeds = [rng.randrange(1 << 60) for _ in range(1000 if harness.SLOW == 1 else 250)]
    failures = []

    def worker():
        while seeds:
            try:
                one = seeds.pop()
            except IndexError:
                return
            try:
                one_hang_up(random.Random(one))
            except ConnectionError:
                pass  # the server may end a connection that it cannot use
            except Exception as e:  # pylint: disable=broad-except
                failures.append(f"seed {one}: {e!r}")

    threads = [threading.Thread(target=worker) for _ in range(12)]
    with HealthWatch():
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures, failures[:3]
    back_to(before)
    assert meaning(ask(TEXT, {"prompt": "x", "max_tokens": 5, "seed": 1}))


# ---- odd connections ---------------------------------------------------------------------------------------------

def a_half_closed_client_still_gets_its_stream():
    before = at_rest()
    body = {**LONG, "max_tokens": 800}
    want = meaning(ask(TEXT, body))
    with socket.create_connection(address(), timeout=60) as s:
        s.sendall(request_bytes(TEXT, body))
        got = s.recv(1)
        s.shutdown(socket.SHUT_WR)
        assert meaning(got + read_all(s)) == want
    # Before a whole answer begins this cannot be told from a hang-up: the answer, its refusal (499) or none are all
    # fine, but nothing stays behind.
    with socket.create_connection(address(), timeout=60) as s:
        s.sendall(request_bytes(TEXT, {**body, "stream": False}))
        s.shutdown(socket.SHUT_WR)
        got = read_all(s)
        assert got == b"" or got.startswith(b"HTTP/1.1 499 ") or meaning(got)
    back_to(before)


def pipelined_requests_are_answered_in_order():
    before = at_rest()
    bodies = [(TEXT, {"prompt": f"Hello {i}", "max_tokens": 5 + i, "seed": i, "stream": i % 3 == 1}) for i in range(9)]
    alone = [meaning(ask(*b)) for b in bodies]
    with socket.create_connection(address(), timeout=60) as s:
        s.sendall(b"".join(request_bytes(*b, close=i == len(bodies) - 1) for i, b in enumerate(bodies)))
        got = read_all(s)
    answers = [b"HTTP/1.1 " + part for part in got.split(b"HTTP/1.1 ")[1:]]
    assert len(answers) == len(bodies), len(answers)
    assert [meaning(a) for a in answers] == alone
    back_to(before)


def a_request_may_come_byte_by_byte():
    body = {"prompt": "Hello", "max_tokens": 3, "seed": 1}
    want = meaning(ask(TEXT, body))
    with socket.create_connection(address(), timeout=60) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for b in request_bytes(TEXT, body):
            s.sendall(bytes([b]))
        assert meaning(read_all(s)) == want


def it_ends_well():
    assert server.stop() == 0, server.stderr()[-2000:]


def main():
    global server
    print(f"seed {SEED} (ERNEST_TEST_SEED)")
    with harness.Server("--model", harness.made_model(), "--max-model-len", str(CONTEXT), "--max-num-seqs", str(CROWD),
                        "--max-concurrency", "256", "--threads", "1", "--memory", "1") as server:
        server.url = server.url.removesuffix("/v1")
        ask(TEXT, {"prompt": "x", "max_tokens": 500, "n": 8, "ignore_eos": True})  # everything was used once
        harness.main(sixty_four_at_once_say_what_each_says_alone, a_slow_reader_is_parked_bounded_and_served_in_full,
                     many_who_never_read_cost_little_and_disturb_nobody, hang_ups_at_any_byte_lose_nothing,
                     a_half_closed_client_still_gets_its_stream, pipelined_requests_are_answered_in_order,
                     a_request_may_come_byte_by_byte, it_ends_well)


if __name__ == "__main__":
    main()
