"""The prefix cache from outside: the same prompt again is found and answered the same, only by those who may find it; the
tiers below the pool keep it, and the one on disk beyond the process; who waits too long is told at the door."""
import json
import os
import re
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli"))
import harness  # noqa: E402
from harness import SLOW, Server, main, run, scratch  # noqa: E402

MODEL = harness.made_model()
DEMO = os.path.join(harness.ROOT, "models", "demo-dense")
PAGE = 64
PATH = "/v1/completions"


def prompt(n, kind=1):
    """n token ids; prompts of different kinds differ from the first token on."""
    return [20 + (kind * 131 + i * i * 7 + i * kind) % 900 for i in range(n)]


def ask(server, ids, headers=None, **more):
    """The whole answer of a completion."""
    body = {"prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}
    with server.post(PATH, body, timeout=120 * SLOW, headers=headers) as answer:
        return json.loads(answer.read())


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def metric(server, name):
    found = re.search(r"^fastdeploy:%s(?:\{[^}]*\})? ([0-9.eE+-]+)$" % re.escape(name), server.get("/metrics")[1], re.M)
    assert found, name
    return float(found[1])


def until(what, seconds=60):
    """Wait for what() to be true."""
    end = time.monotonic() + seconds * SLOW
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def idle(server):
    until(lambda: metric(server, "num_requests_running") == 0)


def refused(server, path, status, body=None, headers=None):
    """The error object and the headers of a call that must be refused."""
    try:
        if body is None:
            answer = urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers or {}), timeout=30 * SLOW)
        else:
            answer = server.post(path, body, headers=headers)
    except urllib.error.HTTPError as e:
        assert e.code == status, (e.code, e.read())
        return json.loads(e.read())["error"], e.headers
    raise AssertionError(f"{path} was answered: {answer.read()}")


def debug(server, headers=None):
    request = urllib.request.Request(server.url + "/debug/kv", headers=headers or {})
    with urllib.request.urlopen(request, timeout=30 * SLOW) as answer:
        return json.loads(answer.read())


# ---- found again, and the same ----------------------------------------------------------------------------------

def the_same_prompt_is_found():
    with Server("--model", DEMO, "--max-model-len", "1024") as s:
        for n in (3, 63, 64, 65, 128, 129, 200, 640):
            ids = prompt(n, kind=n)
            first, second = (ask(s, ids, logprobs=3) for _ in range(2))
            assert cached(first) == 0, (n, first["usage"])
            # Whole pages, and at least one token is left to compute.
            assert cached(second) == (n - 1) // PAGE * PAGE, (n, second["usage"])
            assert first["choices"][0] == second["choices"][0] or drop_times(first) == drop_times(second), n
            assert second["usage"]["prompt_tokens"] == n
        idle(s)
        hit = sum((n - 1) // PAGE * PAGE for n in (3, 63, 64, 65, 128, 129, 200, 640))
        assert metric(s, "prefix_cache_token_num_total") == hit == metric(s, "prefix_gpu_cache_token_num_total")
        assert abs(metric(s, "hit_req_rate") - 5 / 16) < 1e-6, metric(s, "hit_req_rate")
        assert abs(metric(s, "hit_token_rate") - hit / (2 * (3 + 63 + 64 + 65 + 128 + 129 + 200 + 640))) < 1e-6
        assert metric(s, "available_gpu_block_num") == metric(s, "max_gpu_block_num")
        assert metric(s, "free_gpu_block_num") < metric(s, "max_gpu_block_num")
        assert metric(s, "gpu_cache_usage_perc") == 0
        # Only the beginning is the same.
        ids = prompt(640, kind=640)[:200] + prompt(100, kind=3)
        assert cached(ask(s, ids)) == 192
        assert s.stop() == 0


def drop_times(answer):
    return [{k: v for k, v in c.items() if k != "arrival_time"} for c in answer["choices"]]


def streams_tell_it_too():
    with Server("--model", DEMO, "--max-model-len", "1024") as s:
        texts = []
        for want in (0, 192):
            body = {"messages": [{"role": "user", "content": "Once upon a time there was a fox. " * 30}], "max_tokens": 16,
                    "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
            with s.post("/v1/chat/completions", body) as answer:
                events = [json.loads(line[6:]) for line in answer.read().decode().split("\n")
                          if line.startswith("data: {")]
            usage = events[-1]["usage"]
            found = usage["prompt_tokens_details"]["cached_tokens"]
            assert found == (0 if want == 0 else (usage["prompt_tokens"] - 1) // PAGE * PAGE), usage
            texts.append("".join(c["delta"].get("content") or "" for e in events for c in e["choices"]))
        assert found > 0 and texts[0] == texts[1], (found, texts)


def replies_are_found():
    """The next turn of a conversation holds the last reply; without output caching only the prompt is found."""
    for flag, want in (("--enable-output-caching", 192), ("--no-enable-output-caching", 64)):
        with Server("--model", MODEL, "--max-model-len", "1024", flag) as s:
            ids = prompt(100)
            reply = ask(s, ids, max_tokens=120)["choices"][0]["completion_token_ids"]
            assert len(reply) == 120
            again = ask(s, ids + reply + prompt(10, kind=2))
            assert cached(again) == want, (flag, again["usage"])


def a_prompt_counts_once():
    for flags, second in (([], 192), (["--strict-fastdeploy"], 4 * 192)):
        with Server("--model", MODEL, "--max-model-len", "1024", *flags) as s:
            ids = prompt(200)
            first = ask(s, ids, n=4, temperature=1, seed=5)["usage"]
            if not flags:
                assert first["prompt_tokens_details"]["cached_tokens"] == 0, first
            again = ask(s, ids, n=4, temperature=1, seed=5)["usage"]
            assert again["prompt_tokens_details"]["cached_tokens"] == second and again["prompt_tokens"] == 200, again
            two = ask(s, [ids, ids[:100]])["usage"]
            assert two["prompt_tokens_details"]["cached_tokens"] == 192 + 64 and two["prompt_tokens"] == 300, two


def off_finds_nothing():
    with Server("--model", MODEL, "--max-model-len", "1024", "--no-enable-prefix-caching", "--enable-debug-endpoints") as s:
        first, second = (ask(s, prompt(200)) for _ in range(2))
        assert cached(first) == cached(second) == 0 and drop_times(first) == drop_times(second)
        idle(s)
        view = debug(s)
        assert not view["prefix_caching"] and view["pool"]["cached"] == 0, view
        assert view["pool"]["free"] == view["pool"]["pages"], view


# ---- who may find it --------------------------------------------------------------------------------------------

def salts_divide():
    with Server("--model", MODEL, "--max-model-len", "1024") as s:
        ids = prompt(200)
        assert cached(ask(s, ids)) == 0
        assert cached(ask(s, ids, cache_salt="a")) == 0
        assert cached(ask(s, ids, cache_salt="a")) == 192
        assert cached(ask(s, ids, cache_salt="b")) == 0
        assert cached(ask(s, ids, cache_salt="")) == 192  # empty is absent
        assert cached(ask(s, ids, headers={"Authorization": "Bearer whatever"})) == 192  # no keys are set


def keys_divide():
    one, two = ({"Authorization": f"Bearer {k}"} for k in ("key-1", "key-2"))
    keys = ["--api-key", "key-1", "--api-key", "key-2"]
    for flags, shared in (([], 0), (["--share-prefix-cache-across-keys"], 192)):
        with Server("--model", MODEL, "--max-model-len", "1024", *keys, *flags) as s:
            ids = prompt(200)
            assert cached(ask(s, ids, one)) == 0
            assert cached(ask(s, ids, one)) == 192
            assert cached(ask(s, ids, two)) == shared
            assert cached(ask(s, ids, one, cache_salt="x")) == 0
            assert cached(ask(s, ids, two, cache_salt="x")) == shared
            assert cached(ask(s, ids, two, cache_salt="x")) == 192


def the_state_is_shown_when_asked_for():
    with Server("--model", MODEL, "--max-model-len", "1024") as s:
        error, _ = refused(s, "/debug/kv", 404)
        assert "--enable-debug-endpoints" in error["message"], error
    with Server("--model", MODEL, "--max-model-len", "1024", "--enable-debug-endpoints", "--api-key", "k") as s:
        assert refused(s, "/debug/kv", 401)[0]["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer k"}
        for _ in range(2):
            ask(s, prompt(200), key)
        idle(s)
        view = debug(s, key)
        pool = view["pool"]
        assert view["prefix_caching"] and view["output_caching"] and view["page_tokens"] == PAGE, view
        assert pool["held"] == 0 and pool["cached"] >= 3 and pool["free"] + pool["cached"] == pool["pages"], view
        assert view["tree"]["blocks_cached"] >= 3 and view["tree"]["blocks_evicted"] == 0, view
        assert view["tiers"] == {"host": None, "disk": None}, view
        assert view["hits"]["cached_tokens"] == 192 and view["hits"]["request_rate"] == 0.5, view
        assert view["hits"]["token_rate"] == view["hits"]["pool_token_rate"] == 192 / 400, view


# ---- the tiers --------------------------------------------------------------------------------------------------

def push_out(server, pages):
    """Ask for other things until more pages were wanted than there are. Few at a time and with a pause: an eighth of the
    pool is kept copied, and what is wanted faster than it can be copied is given up."""
    for kind in range(100, 100 + pages // 4 + 2):
        ask(server, prompt(256, kind=kind), max_tokens=1)
        time.sleep(0.03 * SLOW)


def host_memory_keeps_what_the_pool_gives_up():
    pool = ["--model", MODEL, "--max-model-len", "1024", "--num-gpu-blocks-override", "80", "--max-num-seqs", "1"]
    ids = prompt(300)
    with Server(*pool) as s:
        first = ask(s, ids)
        push_out(s, 80)
        assert cached(ask(s, ids)) == 0
    with Server(*pool, "--swap-space", "0.05", "--enable-debug-endpoints") as s:
        ask(s, ids)
        push_out(s, 80)
        again = ask(s, ids)
        assert cached(again) == 256 and drop_times(again) == drop_times(first), again["usage"]
        idle(s)
        host = debug(s)["tiers"]["host"]
        assert host["moved_out"] >= 4 and host["moved_in"] >= 4 and host["errors"] == 0, host
        assert 0 < host["blocks"] <= host["max_blocks"] == metric(s, "max_cpu_block_num"), host
        assert metric(s, "prefix_cpu_cache_token_num_total") == 256
        assert 0 < metric(s, "cpu_hit_token_rate") == metric(s, "hit_token_rate")
        assert f"\nhost tier {host['max_blocks'] * PAGE} tokens" in "\n" + s.stdout(), s.stdout()


def settled(server):
    """Nothing was written to the disk tier for a while."""
    seen, since = -1, time.monotonic()
    def same():
        nonlocal seen, since
        now = debug(server)["tiers"]["disk"]["moved_out"]
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 0.3
    until(same)
    return seen


def a_disk_remembers_beyond_the_process():
    folder = tempfile.mkdtemp(prefix="store-", dir=scratch)
    store = ["--kvcache-storage-backend", "file", "--kvcache-storage-dir", folder, "--kvcache-storage-gb", "0.1",
             "--write-policy", "write_through", "--enable-debug-endpoints"]
    line = ["--model", MODEL, "--max-model-len", "1024", *store]
    ids = prompt(300)
    with Server(*line) as s:
        first = ask(s, ids)
        assert cached(first) == 0 and cached(ask(s, ids, cache_salt="x")) == 0
        assert settled(s) >= 8, debug(s)
        assert cached(ask(s, ids)) == 256  # from the pool
        code, _, err, _ = run(["serve", *line, "--port", "0"])  # a folder has one owner
        assert code in (1, 2) and "--kvcache-storage-dir" in err, (code, err)
        assert s.stop() == 0
    with Server(*line) as s:
        until(lambda: debug(s)["tiers"]["disk"]["blocks"] >= 8)  # names are read while it runs
        again = ask(s, ids)
        assert cached(again) == 256 and drop_times(again) == drop_times(first), again["usage"]
        assert cached(ask(s, ids, cache_salt="y")) == 0
        assert cached(ask(s, ids, cache_salt="x")) == 256
        idle(s)
        disk = debug(s)["tiers"]["disk"]
        assert disk["moved_in"] >= 8 and disk["errors"] == 0 and not disk["off"], disk
        assert metric(s, "prefix_ssd_cache_token_num_total") == 512
        assert s.stop() == 0
    with Server(*line, "--kv-cache-dtype", "int8") as s:  # other numbers in the pages
        assert cached(ask(s, ids)) == 0
        assert s.stop() == 0
    # Damaged files are no hits, and no faults.
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".kv"):
                with open(os.path.join(root, name), "r+b") as f:
                    f.seek(-9, os.SEEK_END)
                    byte = f.read(1)
                    f.seek(-9, os.SEEK_END)
                    f.write(bytes([byte[0] ^ 1]))
    with Server(*line) as s:
        until(lambda: debug(s)["tiers"]["disk"]["blocks"] >= 8)
        again = ask(s, ids)
        assert cached(again) == 0 and drop_times(again) == drop_times(first), again["usage"]
        assert s.stop() == 0


def keys_are_known_again():
    """A key's pages are its own after a restart, wherever it stands in the list; another key does not find them."""
    folder = tempfile.mkdtemp(prefix="store-", dir=scratch)
    line = ["--model", MODEL, "--max-model-len", "1024", "--kvcache-storage-backend", "file", "--kvcache-storage-dir", folder,
            "--kvcache-storage-gb", "0.1", "--enable-debug-endpoints"]
    one, two = ({"Authorization": f"Bearer {k}"} for k in ("key-1", "key-2"))
    ids = prompt(200)
    with Server(*line, "--api-key", "key-1") as s:
        assert cached(ask(s, ids, one)) == 0
        until(lambda: debug(s, one)["tiers"]["disk"]["moved_out"] >= 3)
        assert s.stop() == 0
    with Server(*line, "--api-key", "key-2", "--api-key", "key-1") as s:
        until(lambda: debug(s, one)["tiers"]["disk"]["blocks"] >= 3)
        assert cached(ask(s, ids, two)) == 0
        assert cached(ask(s, ids, one)) == 192
        assert s.stop() == 0
    for root, _, names in os.walk(folder):  # what lies there tells no key
        for name in names:
            with open(os.path.join(root, name), "rb") as f:
                assert b"key-1" not in f.read(), name


# ---- at the door ------------------------------------------------------------------------------------------------

def beside(call):
    """Run call() in a thread; its result is in the list that is given back, once the thread is joined."""
    out = []
    def work():
        try:
            out.append(call())
        except Exception as e:  # told by whoever looks at it
            out.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    return thread, out


def a_full_queue_says_when_to_come_back():
    with Server("--model", MODEL, "--max-model-len", "16384", "--max-num-seqs", "1", "--max-queue-prompt-tokens", "3000") as s:
        long_one = s.post(PATH, {"prompt": [20], "max_tokens": 16000, "ignore_eos": True, "stream": True})
        until(lambda: metric(s, "num_requests_running") == 1)
        thread, out = beside(lambda: ask(s, prompt(2000)))
        until(lambda: metric(s, "num_requests_waiting") == 1)
        error, headers = refused(s, PATH, 429, {"prompt": prompt(2000, 2), "max_tokens": 1})
        assert error["code"] == "queue_full" and "prompt tokens are waiting" in error["message"], error
        assert 1 <= int(headers["Retry-After"]) <= 60 and 800 <= int(headers["retry-after-ms"]) <= 60000, dict(headers)
        long_one.close()
        thread.join(120 * SLOW)
        assert isinstance(out[0], dict) and out[0]["usage"]["prompt_tokens"] == 2000, out


def who_would_wait_too_long_is_told_at_once():
    line = ["--model", MODEL, "--max-model-len", "16384", "--max-num-seqs", "1"]
    for flags, headers, words in (([], {"X-Request-Deadline-Ms": "2"}, "past the request's deadline"),
                                  (["--max-queue-wait-s", "0.002"], {}, "longer than the 0.0 s that are allowed")):
        with Server(*line, *flags) as s:
            ask(s, prompt(2000), max_tokens=1)  # shows how fast prompts are
            long_one = s.post(PATH, {"prompt": [20], "max_tokens": 16000, "ignore_eos": True, "stream": True})
            until(lambda: metric(s, "num_requests_running") == 1)
            thread, out = beside(lambda: ask(s, prompt(8000, 2), max_tokens=1))
            until(lambda: metric(s, "num_requests_waiting") == 1)
            error, told = refused(s, PATH, 429, {"prompt": prompt(10, 3), "max_tokens": 1}, headers)
            assert error["code"] == "queue_full" and words in error["message"], error
            assert 1 <= int(told["Retry-After"]) <= 60, dict(told)
            long_one.close()
            thread.join(120 * SLOW)
            assert isinstance(out[0], dict), out


def reserves_all_when_asked():
    """V0: requests wait for all the pages they may come to, so nothing is ever stopped and computed again."""
    env = {"ENABLE_V1_KVCACHE_SCHEDULER": "0"}
    with Server("--model", MODEL, "--max-model-len", "1024", "--num-gpu-blocks-override", "40", env=env) as s:
        threads = [beside(lambda k=k: ask(s, prompt(300, k), max_tokens=500)) for k in range(8)]
        for thread, _ in threads:
            thread.join(120 * SLOW)
        for _, out in threads:
            assert isinstance(out[0], dict) and out[0]["usage"]["completion_tokens"] == 500, out
        assert metric(s, "request_preempted_total") == 0


if __name__ == "__main__":
    main(the_same_prompt_is_found, streams_tell_it_too, replies_are_found, a_prompt_counts_once, off_finds_nothing,
         salts_divide, keys_divide, the_state_is_shown_when_asked_for, host_memory_keeps_what_the_pool_gives_up,
         a_disk_remembers_beyond_the_process, keys_are_known_again, a_full_queue_says_when_to_come_back,
         who_would_wait_too_long_is_told_at_once, reserves_all_when_asked)
