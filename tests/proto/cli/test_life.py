#!/usr/bin/env python3
"""A server's life: what it says when ready, what its log holds, how signals end it; the terminal commands against it;
FastDeploy's module names."""
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from harness import BIN, ROOT, SLOW, Server, clean_env, made_model, main, run, scratch

MODEL = made_model()


def chat_body(**more):
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **more}


def says_eight_lines():
    with Server("--model", MODEL) as s:
        lines = s.stdout().rstrip("\n").split("\n")
        heads = [line.split()[0] for line in lines]
        assert heads == ["model", "format", "weights", "kv", "at", "threads", "address", "try"], lines
        kernels = ("portable", "avx2", "avx512", "avx512 vnni", "avx512 vnni bf16", "amx")
        assert lines[5].endswith(tuple("cpu backend, " + k for k in kernels)), lines[5]  # the kernels, not the machine
        assert s.url in lines[6] and "this machine only" in lines[6], lines[6]
        status, _ = s.get("/health")
        assert status == 200
        command = lines[7].split("try", 1)[1].strip()
        answer = subprocess.run(["sh", "-c", command + " -s"], capture_output=True, text=True, timeout=60 * SLOW)
        assert "choices" in json.loads(answer.stdout), answer.stdout
        assert s.stop() == 0


def on_a_free_port(env):
    """A server with its metrics on a port of their own; another process may take the port first, then on another one."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        try:
            return port, Server("--model", MODEL, "--metrics-port", str(port), env=env)
        except AssertionError as e:
            if "the port is taken" not in str(e):
                raise


def serves_beyond_the_soft_limit():
    """The soft limit of open files is raised to the hard one; what still does not fit is said with what mends it."""
    few = ["sh", "-c", 'ulimit -Sn 256 && exec "$0" serve "$@"', BIN]
    with Server("--model", MODEL, "--max-concurrency", "200", program=few) as s:
        where = urllib.parse.urlparse(s.url)
        idle = [socket.create_connection((where.hostname, where.port)) for _ in range(150)]  # half of 256 are less
        assert s.get("/health", timeout=60)[0] == 200
        assert "event=serve.open_files" not in s.stderr(), s.stderr()
        for one in idle:
            one.close()
        assert s.stop() == 0
    few[2] = few[2].replace("-Sn", "-n")
    with Server("--model", MODEL, "--max-concurrency", "200", program=few) as s:
        assert len(re.findall(r"event=serve.open_files limit=256 need=528 .*ulimit -Hn 528", s.stderr())) == 1, s.stderr()
        assert s.stop() == 0


def logs_what_scripts_look_for():
    folder = os.path.join(scratch, "new", "logs")
    env = {"FD_LOG_DIR": folder, "CUDA_VISIBLE_DEVICES": "0", "FD_SAMPLING_CLASS": "rejection", "FD_TRACE": "off"}
    with Server("--model", MODEL, "--use-cudagraph", "--kv-cache-ratio", "0.75", "--num-gpu-blocks-override", "77", env=env) as s:
        err = s.stderr()
        for name in ("--use-cudagraph", "--kv-cache-ratio", "CUDA_VISIBLE_DEVICES", "FD_SAMPLING_CLASS", "FD_TRACE"):
            assert len(re.findall(rf"event=serve.ignored option={name} why=", err)) == 1, (name, err)
        assert "event=serve.ignored option=--revision" not in err  # not given
        with open(os.path.join(folder, "fastdeploy.log"), encoding="utf-8") as f:
            log = f.read()
        assert "Reset block num, the total_block_num:77, prefill_kvcache_block_num:77" in log, log
        assert "Application startup complete" in log
        with open(os.path.join(folder, "api_server.log"), encoding="utf-8") as f:
            api = f.read()
        args = eval(re.search(r"args: (.*)", api).group(1), {"__builtins__": {}})  # a Python dict, as FastDeploy writes
        assert args["num_gpu_blocks_override"] == 77 and args["use_cudagraph"] is True, args
        assert f"Launching chat completion service at {s.url}/v1/chat/completions" in api
        assert f"Launching metrics service at {s.url}/metrics" in api
        assert s.stop(signal.SIGINT) == 0
    env["FD_LOG_DIR"] = folder + "-2"
    port, server = on_a_free_port(env)
    with server as s:
        with open(os.path.join(folder + "-2", "api_server.log"), encoding="utf-8") as f:
            url = re.search(r"Launching metrics service at (\S+)", f.read()).group(1)
        assert url == f"http://127.0.0.1:{port}/metrics", url
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"fastdeploy:" in answer.read()
        assert s.stop() == 0


def tells_the_model_it_was_given_alone():
    folder = os.path.join(scratch, "alone-logs")
    env = {"FD_LOG_DIR": folder, "FD_DISABLE_CHUNKED_PREFILL": "1"}
    with Server(MODEL, env=env) as s:
        info = json.loads(s.get("/config-info")[1])
        with open(os.path.join(folder, "api_server.log"), encoding="utf-8") as f:
            args = eval(re.search(r"args: (.*)", f.read()).group(1), {"__builtins__": {}})
        for where in (info, args):
            assert MODEL in json.dumps(where.get("model", where)), where
        assert args["model"] == MODEL and args["enable_chunked_prefill"] is False, args
        assert '"enable_chunked_prefill": false' in json.dumps(info), info
        assert s.stop() == 0


def says_what_changes_nothing():
    """One line each, at --log-level warn too, and by the checks that start nothing."""
    env = {"FD_TRACE": "off", "TRACES_ENABLE": "1", "MAX_PREFILL_NUM": "3", "SPECULATE_VERIFY_USE_TOPK": "1",
           "FLAGS_max_partition_size": "1024", "FD_MAX_STOP_SEQS_NUM": "3", "FD_STOP_SEQS_MAX_LEN": "4", "OTHERS_FD_X": "1"}
    flags = ["--use-cudagraph", "--reasoning-parser", "ernie-x1", "--tool-call-parser", "ernie-x1", "--backend", "ref",
             "--threads", "1", "--cpu-level", "portable", "--log-level", "warn"]
    names = [n for n in env if n != "OTHERS_FD_X"] + ["--use-cudagraph", "--reasoning-parser", "--tool-call-parser", "--threads",
                                                    "--cpu-level"]
    said = {}
    with Server("--model", MODEL, *flags, env=env) as s:
        said["serve"] = s.stderr()
        assert s.stop() == 0
    for check in ("--check-config", "--dry-run"):
        code, _, said[check], _ = run(["serve", MODEL, *flags, check], env)
        assert code == 0, said[check]
    for where, err in said.items():
        found = re.findall(r"event=serve.ignored option=(\S+) why=", err)
        assert sorted(found) == sorted(names), (where, err)
    env = {"FD_MAX_STOP_SEQS_NUM": "3", "FD_STOP_SEQS_MAX_LEN": "4"}
    assert "serve.ignored" not in run(["serve", MODEL, "--strict-fastdeploy", "--threads", "1", "--check-config"], env)[2]


def tells_what_the_config_says_beyond_us():
    """Keys that nobody knows, and an MTP layer that is announced and not there: one line each."""
    with open(os.path.join(made := made_model("tiny-moe", "paddle"), "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    assert config["num_nextn_predict_layers"] == 1
    _, _, err, _ = run(["serve", made, "--check-config"])
    assert "event=serve.config" not in err and "event=serve.mtp" not in err, err
    with open(os.path.join(made, "config.json"), "w", encoding="utf-8") as f:
        json.dump({**config, "some_new_key": 1, "another_key": [2]}, f)
    shutil.rmtree(os.path.join(made, "mtp"))
    with Server("--model", made) as s:
        err = s.stderr()
        assert s.stop() == 0
    for err in (err, run(["serve", made, "--check-config"])[2]):
        assert re.findall(r"event=serve.config key=(\S+)", err) == ["some_new_key", "another_key"], err
        assert err.count("event=serve.mtp") == 1, err


def says_when_a_weight_file_is_cut():
    model = made_model()
    with Server("--model", model) as s:
        os.truncate(os.path.join(model, "model.safetensors"), 0)
        try:
            s.post("/v1/chat/completions", chat_body(), timeout=30 * SLOW).close()
        except OSError:
            pass  # the server went while it was asked
        assert s.process.wait(30 * SLOW) == 3, s.process.returncode
        assert s.stderr().count("weight file was cut") == 1, s.stderr()


def says_what_the_cache_is_without():
    """Flags of the prefix cache that have nothing to do: one line each; and what is on by default says nothing."""
    flags = ["--no-enable-prefix-caching", "--swap-space", "0.1", "--enable-output-caching", "--share-prefix-cache-across-keys",
             "--memory", "1", "--gpu-memory-utilization", "0.5", "--long-prefill-token-threshold", "100", "--kv-cache-ratio", "0.5"]
    found = re.findall(r"event=serve.ignored option=(\S+) why=", run(["serve", MODEL, *flags, "--check-config"])[2])
    assert sorted(found) == sorted(["--swap-space", "--enable-output-caching", "--share-prefix-cache-across-keys",
                                    "--gpu-memory-utilization", "--long-prefill-token-threshold", "--kv-cache-ratio"]), found
    assert "serve.ignored" not in run(["serve", MODEL, "--enable-prefix-caching", "--gpu-memory-utilization", "0.9",
                                       "--check-config"])[2]
    v0 = run(["serve", MODEL, "--kv-cache-ratio", "0.5", "--check-config"], {"ENABLE_V1_KVCACHE_SCHEDULER": "0"})
    assert v0[0] == 0 and "serve.ignored" not in v0[2], v0


def tells_the_pages_of_prompts():
    """FastDeploy's scripts read both numbers: the same under V1, a part of it under V0."""
    for env, part in (({}, 80), ({"ENABLE_V1_KVCACHE_SCHEDULER": "0"}, 60)):
        with Server("--model", MODEL, "--num-gpu-blocks-override", "80", env=env) as s:
            assert f"Reset block num, the total_block_num:80, prefill_kvcache_block_num:{part}" in s.stderr(), s.stderr()
            assert ("60 for prompts" in s.stdout()) == (part == 60), s.stdout()
            assert s.stop() == 0


def plans_the_tiers():
    store = os.path.join(scratch, "planned")
    code, out, err, _ = run(["serve", MODEL, "--dry-run", "--swap-space", "0.1", "--kvcache-storage-backend", "file",
                             "--kvcache-storage-dir", store, "--kvcache-storage-gb", "0.5"])
    assert code == 0, err
    line = {text[:9]: text for text in out.split("\n")}
    kv = line["kv cache "]
    pages = int((re.search(r"room for (\d+)", kv) or re.search(r"(\d+) pages of 64", kv)).group(1))
    page_bytes = size(kv)[0] / pages
    host, disk = (int(re.search(r"(\d+) pages", line[name]).group(1)) for name in ("host tier", "disk tier"))
    for count, gib in ((host, 0.1), (disk, 0.5)):
        assert abs(count * page_bytes / (gib * 2**30) - 1) < 0.02, (count, gib, out)
    assert store in line["disk tier"] and not os.path.exists(store), out
    parts = [size(text.split(";")[-1]) for name, text in line.items()
             if name.strip() in ("weights", "kv cache", "host tier", "scratch", "tables")]
    total = size(line["total    "])
    assert len(parts) == 5 and abs(sum(p[0] for p in parts) - total[0]) <= sum(p[1] for p in parts) + total[1], out
    code, _, err, _ = run(["serve", MODEL, "--dry-run", "--swap-space", "0.00001"])
    assert code == 2 and "--swap-space" in err, err  # not one page
    assert "tier" not in run(["serve", MODEL, "--dry-run"])[1]


def warns_when_open():
    with Server("--model", MODEL, "--host", "0.0.0.0") as s:
        assert "asks for no key" in s.stderr()
        assert s.stop() == 0
    with Server("--model", MODEL, "--host", "0.0.0.0", "--api-key", "k") as s:
        assert "asks for no key" not in s.stderr()
        try:
            s.post("/v1/chat/completions", chat_body())
            raise AssertionError("answered without a key")
        except urllib.error.HTTPError as e:
            assert e.code == 401
        for wrong, code in (("x", 1), ("k", 0)):
            got, out, err, _ = run(["chat", "--url", s.url, "--api-key", wrong, "-q", "Hello", "--max-tokens", "4"])
            assert got == code, (wrong, out, err)
        assert s.stop() == 0


class Stream(threading.Thread):
    """A long streamed answer, read to its end."""

    def __init__(self, server, tokens):
        super().__init__()
        self.server, self.tokens, self.text, self.error = server, tokens, "", None
        self.begun = threading.Event()

    def run(self):
        try:
            body = chat_body(stream=True, max_tokens=self.tokens, ignore_eos=True, min_tokens=self.tokens)
            with self.server.post("/v1/chat/completions", body, timeout=120 * SLOW) as answer:
                for line in answer:
                    self.text += line.decode()
                    self.begun.set()
        except Exception as e:
            self.error = e
        self.begun.set()


def first_signal_drains():
    """A request that runs when SIGTERM comes is finished; a new one is refused; the exit code is 0."""
    with Server("--model", MODEL, "--max-model-len", "8192", "--timeout-graceful-shutdown", "600") as s:
        stream = Stream(s, 6000)
        stream.start()
        assert stream.begun.wait(60 * SLOW)
        s.process.send_signal(signal.SIGTERM)
        while True:  # the signal takes its way; from some moment on nothing more is taken in
            try:
                s.post("/v1/chat/completions", chat_body(max_tokens=1)).close()
            except urllib.error.HTTPError as e:
                assert e.code == 503, e
                break
            except (urllib.error.URLError, ConnectionError):
                break  # the drain is over already
        stream.join(120 * SLOW)
        assert stream.error is None and stream.text.rstrip().endswith("data: [DONE]"), (stream.error, stream.text[-300:])
        assert '"finish_reason":"length"' in stream.text, stream.text[-600:]
        assert s.process.wait(30 * SLOW) == 0


def second_signal_hurries():
    with Server("--model", MODEL, "--max-model-len", "131072", "--backend", "ref") as s:
        stream = Stream(s, 100000)
        stream.start()
        assert stream.begun.wait(60 * SLOW)
        s.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert s.process.poll() is None, "the drain did not wait for the running request"
        s.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert s.process.wait(20 * SLOW) == 0, s.stderr()[-500:]
        assert time.monotonic() - begin < 5 * SLOW
        stream.join(30)
        assert not stream.is_alive()


def drain_has_a_limit():
    with Server("--model", MODEL, "--max-model-len", "131072", "--backend", "ref", "--timeout-graceful-shutdown", "1") as s:
        stream = Stream(s, 100000)
        stream.start()
        assert stream.begun.wait(60 * SLOW)
        begin = time.monotonic()
        assert s.stop(timeout=30 * SLOW) == 0
        assert time.monotonic() - begin < 6 * SLOW
        stream.join(30)


def stops_while_loading():
    """SIGTERM at any moment of the start ends the process soon, and with 0 or by the signal's default."""
    for delay in (0.0, 0.002, 0.005, 0.01, 0.05):
        with Server("--model", MODEL, wait=False) as s:
            time.sleep(delay)
            code = s.stop(timeout=20 * SLOW)
            assert code in (0, -signal.SIGTERM), (delay, code, s.stderr())


def size(text, unit={"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}):
    """The first size in a text, and how far its rounding may be off."""
    number, word = re.search(r"([\d.]+) (bytes|KiB|MiB|GiB)\b", text).groups()
    return float(number) * unit[word], unit[word] * (0.5 / 10 ** len(number.partition(".")[2]))


def plans_and_prints():
    for backend in ("cpu", "ref"):
        code, out, err, _ = run(["serve", MODEL, "--dry-run", "--memory", "1", "--backend", backend])
        assert code == 0, (out, err)
        line = {text.split("  ")[0]: text for text in out.split("\n") if text}
        parts = [size(line[name].split(";")[-1]) for name in ("weights", "kv cache", "scratch", "tables")]
        total = size(line["total"])
        assert abs(sum(p[0] for p in parts) - total[0]) <= sum(p[1] for p in parts) + total[1], out
    for flag in ("--dry-run", "--check-config", "--print-config"):
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = subprocess.run([BIN, "serve", MODEL, flag], env=clean_env(), stdout=full, stderr=subprocess.PIPE, text=True,
                                  timeout=60 * SLOW, check=False)
        assert done.returncode in (1, 2) and done.stderr.count("ernest: cannot write to standard output") == 1, (flag, done)
    code, out, err, _ = run(["serve", MODEL, "--print-config", "--port", "1234"])
    assert code == 0 and "\nport: 1234" in out, (out, err)
    path = os.path.join(scratch, "again.yaml")
    with open(path, "w", encoding="utf-8") as f:
        f.write(out)
    assert f'\nmodel: "{MODEL}"' in "\n" + out, out
    code, again, err, _ = run(["serve", "--config", path, "--print-config"])
    assert code == 0, err
    code, _, err, _ = run(["serve", "--config", path, "--check-config"])
    assert code == 0, err
    given = re.compile(r"^[^#].*", re.M)
    drop = re.compile(r"  # .*$", re.M)
    assert [drop.sub("", x) for x in given.findall(out)] == [drop.sub("", x) for x in given.findall(again)], (out, again)


def documents_itself():
    for words in (["--help"], ["help"], ["serve", "--help"], ["serve", "--help=kv"], ["serve", "--help=listgroup"],
                  ["chat", "--help"], ["complete", "-h"], ["tokenize", "--help"], ["tokenizer", "--help"],
                  ["make-model", "--help"], ["collect-env", "--help"], ["docs", "--help"], ["version"], ["--version"],
                  ["help", "serve"], ["collect-env"], ["docs", "man"], ["docs", "completion"], ["docs", "flags"]):
        code, out, err, _ = run(words)
        assert code == 0 and out and not err, (words, code, err)
    for words in ([], ["sevre"], ["serve", "--help=xyzzy"], ["docs"], ["docs", "pdf"], ["version", "x"], ["collect-env", "x"],
                  ["help", "xyzzy"], ["chat", "--nonsense"], ["make-model"], ["make-model", "x", "--out", "y"], ["tokenize", "x"], ["complete", "stray"],
                  ["chat", "--url", "nowhere"], ["chat", "--url", "http://x/v1", MODEL], ["make-model", "--out", "/proc/x/y"]):
        code, _, err, _ = run(words)
        assert code == 2, (words, code, err)
    done = subprocess.run(["bash", "-c", f"source <({BIN} docs completion); COMP_WORDS=(ernest serve --max-mod); COMP_CWORD=2; "
                           "_ernest; echo ${COMPREPLY[@]}"], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout.split() == ["--max-model-len"], done
    for name in ("flags", "api"):
        with open(os.path.join(ROOT, "docs", name + ".md"), encoding="utf-8") as f:
            assert f.read() == run(["docs", name])[1], f"docs/{name}.md is old: ernest docs {name} > docs/{name}.md"


def takes_logprobs_from():
    """Each --logprobs-mode by what it shows of one token at temperature 1/2: logits are doubled where processed."""
    shown = {}
    for mode in ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"):
        with Server("--model", MODEL, "--logprobs-mode", mode) as s:
            with s.post("/v1/chat/completions", chat_body(max_tokens=1, temperature=0.5, top_p=1, seed=3, logprobs=True,
                                                          top_logprobs=2)) as answer:
                top = json.load(answer)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            shown[mode] = [entry["logprob"] for entry in top]
    gap = {mode: pair[0] - pair[1] for mode, pair in shown.items()}
    near = 1e-3
    assert gap["raw_logits"] > 20 * near, shown
    assert abs(gap["raw_logprobs"] - gap["raw_logits"]) < near, shown
    assert abs(gap["processed_logprobs"] - 2 * gap["raw_logits"]) < near, shown
    assert abs(shown["processed_logits"][0] - 2 * shown["raw_logits"][0]) < near, shown
    assert shown["raw_logprobs"][0] < 0 and shown["processed_logprobs"][0] < 0, shown
    assert abs(shown["raw_logprobs"][0] - shown["raw_logits"][0]) > near, shown


def makes_a_model_or_nothing():
    """Ctrl-C in the middle of make-model leaves nothing behind."""
    folder = os.path.join(scratch, "never")
    part = os.path.join(folder, "making.part", "model.safetensors")
    process = subprocess.Popen([BIN, "make-model", "--shape", "0.3b", "--layers", "64", "--out", folder],
                               env=clean_env(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60 * SLOW
    while not os.path.exists(part):
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60 * SLOW)
    assert process.returncode == 1 and "stopped" in err, (process.returncode, err)
    assert not os.path.exists(folder), os.listdir(folder)


def tokenizes():
    code, out, err, _ = run(["tokenize", "--model", MODEL, "Hello wörld 你好"])
    assert code == 0, err
    ids = json.loads([line for line in out.split("\n") if line.startswith("[")][0])
    assert len(ids) > 3
    code, back, err, _ = run(["tokenizer", "-m", MODEL, "-d", json.dumps(ids)])
    assert code == 0 and "Hello wörld 你好" in back, (back, err)
    assert run(["tokenize", "--model", MODEL], stdin="Hello wörld 你好")[1] == out
    code, size, _, _ = run(["tokenizer", "-m", MODEL, "-vs"])
    path = os.path.join(scratch, "vocabulary.json")
    assert run(["tokenizer", "-m", MODEL, "-i", "-ve", path])[0] == 0
    with open(path, encoding="utf-8") as f:
        assert len(json.load(f)) == int(size)
    code, _, err, _ = run(["tokenize", "--model", MODEL, "-d", "[1, 99999999]"])
    assert code == 2 and "99999999" in err, err
    assert run(["tokenize", "--model", MODEL, "-d", "[1, x]"])[0] == 2
    code, _, err, _ = run(["tokenize", MODEL, "Hello"])
    assert code == 2 and f"ernest tokenize --model {MODEL}" in err, err


def makes_a_large_model_in_little_memory():
    """The layers and shards are written piece by piece: 250 MB of weights in less than 100 MiB."""
    if os.environ.get("ERNEST_SAN"):
        print("        left out: a sanitizer's memory is its own")
        return
    folder = os.path.join(scratch, "large")
    process = subprocess.Popen([BIN, "make-model", "--shape", "0.3b", "--layers", "2", "--out", folder], env=clean_env(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    written = os.path.getsize(os.path.join(folder, "model.safetensors"))
    shutil.rmtree(folder)
    assert process.returncode == 0 and written > 240e6, (process.returncode, written)
    assert usage.ru_maxrss < 100 * 1024, f"{usage.ru_maxrss} KiB"


def collects_what_a_report_needs():
    code, out, err, _ = run(["collect-env"], {"FD_SOMETHING_NEW": "7", "FD_API_KEY": "secret1", "ENABLE_V1_KVCACHE_SCHEDULER": "1"})
    assert code == 0, err
    for words in ("FD_SOMETHING_NEW=7", "FD_API_KEY=(set)", "ENABLE_V1_KVCACHE_SCHEDULER=1", "sentencepiece 0.", "libmicrohttpd ",
                  "xxhash 0."):
        assert words in out, (words, out)
    assert "secret1" not in out
    for words, expected in ((["docs", "ma"], ["man"]), (["help", "tok"], ["tokenize"]), (["docs", ""], ["api", "flags", "man", "completion"])):
        line = " ".join(f"'{w}'" for w in ["ernest", *words])
        done = subprocess.run(["bash", "-c", f"source <({BIN} docs completion); COMP_WORDS=({line}); COMP_CWORD=2; _ernest; "
                               "echo ${COMPREPLY[@]}"], capture_output=True, text=True, timeout=20, check=False)
        assert done.stdout.split() == expected, (words, done)


def talks_in_the_terminal():
    with Server("--model", MODEL) as s:
        flags = ["--url", s.url, "--max-tokens", "6", "--temperature", "0"]
        one = run(["chat", *flags, "-q", "Hello"])
        assert one[0] == 0 and one[1].strip(), one
        assert run(["chat", *flags, "-q", "Hello"])[1] == one[1]  # the same question, the same answer
        code, out, err, _ = run(["chat", *flags, "--system-prompt", "Be brief."], stdin="Hello\n/reset\n\nHello\n/exit\nnever\n")
        assert code == 0 and len(out) > 0, (out, err)
        assert "never" not in out
        assert run(["complete", *flags, "-q", "Once upon"])[0] == 0
        code, out, err, _ = run(["complete", *flags], stdin="Once upon\na time\n")
        assert code == 0 and out.count("\n") >= 2, (out, err)
        assert run(["chat", *flags, "--model-name", "m", "-q", "Hello"])[0] == 0
        assert s.stop() == 0
        code, _, err, _ = run(["chat", *flags, "-q", "Hello"])
        assert code == 1 and "no server" in err, err


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *words):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(words[0], words, clean_env({"TERM": "xterm"}))
        self.seen = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, text, timeout=30 * SLOW):
        """Read until text appears; what came before it is dropped."""
        until = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < until, f"no '{text}' in '{self.seen[-400:]}'"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        self.seen = self.seen.split(text, 1)[1]

    def expect_more(self, timeout=30 * SLOW):
        """Read until anything comes after what was expected."""
        until = time.monotonic() + timeout
        while not self.seen:
            assert time.monotonic() < until, "nothing more came"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")

    def end(self, timeout=30 * SLOW):
        """The exit code; output that nobody waits for is read away. A program that does not end is killed."""
        until = time.monotonic() + timeout
        try:
            while time.monotonic() < until:
                if select.select([self.fd], [], [], 0.1)[0] and not os.read(self.fd, 65536):
                    break
        except OSError:
            pass  # the program's side is closed
        ended = 0
        while not ended and time.monotonic() < until:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0 if ended else 0.01)
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
        assert ended, f"still running after {timeout} s"
        return os.waitstatus_to_exitcode(status)


def ctrl_c_stops_an_answer():
    """Ctrl-C ends the answer, frees its place in the server, and the talk goes on; at the prompt it ends the talk."""
    try:
        for fd in os.openpty():
            os.close(fd)
    except OSError as e:
        print(f"        left out: this machine has no pseudo-terminals ({e})")
        return
    with Server("--model", MODEL, "--max-model-len", "131072", "--backend", "ref", "--max-num-seqs", "1") as s:
        for ending in ("/exit\n", "\x03", "\x04"):
            # Greedy on ref: this model's answer has no end before the context's, on any machine.
            t = Terminal(BIN, "chat", "--url", s.url, "--max-tokens", "100000", "--temperature", "0")
            t.expect("/help shows")
            t.expect("> ")
            t.type("Hello\n")
            t.expect("\r\n")  # the echo of what was typed
            t.expect_more()  # the answer has begun
            t.type("\x03")
            t.expect("[stopped]")
            t.expect("> ")
            t.type("/rest\n")
            t.expect("/rest is no command")
            t.expect("> ")
            t.type("/reset\n")
            t.expect("forgotten")
            t.expect("> ")
            t.type(ending)
            assert t.end() == 0
        assert s.stop() == 0


def chats_with_a_folder():
    """`ernest chat DIR` starts a server, and leaves none behind."""
    code, out, err, _ = run(["chat", MODEL, "--max-tokens", "6", "-q", "Hello"], timeout=60 * SLOW)
    assert code == 0 and out.strip(), (code, out, err)
    mine = [p for p in os.listdir("/proc") if p.isdigit() and MODEL in command_line(p)]
    assert not mine, [command_line(p) for p in mine]
    code, _, err, _ = run(["chat", scratch, "-q", "Hello"], timeout=60 * SLOW)
    assert code == 2 and "config.json" in err, (code, err)


def own_server_has_the_clients_key():
    """The server of `chat DIR` and `complete DIR` listens on this machine alone and asks for the key the client says."""
    env = {"ERNEST_HOST": "203.0.113.7", "FD_API_KEY": "k1,k2"}
    for words in (["chat", MODEL], ["complete", "--model", MODEL]):
        for key in ([], ["--api-key", "k3"]):
            code, out, err, _ = run([*words, *key, "--max-tokens", "4", "--max-model-len", "64", "-q", "Hello"], env,
                                    timeout=60 * SLOW)
            assert code == 0 and out.strip(), (words, key, code, out, err)
        code, out, err, _ = run([*words, "--max-model-len", "16", "-q", "Hello " * 40], timeout=60 * SLOW)
        assert code == 1 and "16" in err, (words, code, out, err)
        code, out, err, _ = run([*words, "--max-model-len", "15", "-q", "Hello"], timeout=60 * SLOW)
        assert code == 2 and "--max-model-len" in err, (words, code, out, err)
        code, _, err, _ = run([words[0], "--max-model-len", "64", "-q", "Hello"])
        assert code == 2 and "name a model" in err, (code, err)


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def answers_to_fastdeploys_name():
    """The seeds' `python -m fastdeploy.entrypoints.openai.api_server`, with FastDeploy's address and ernest's warning."""
    env = {"PYTHONPATH": os.path.join(ROOT, "python"), "ERNEST_BIN": BIN}
    module = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
    with Server("--model", MODEL, "--max_num_seqs", "16", env=env, program=module) as s:
        assert "asks for no key" in s.stderr(), s.stderr()
        assert s.get("/health")[0] == 200
        assert s.stop() == 0  # the process is ernest itself, so the signal reached it
    with Server("--model", MODEL, "--host", "127.0.0.1", env=env, program=module) as s:
        assert "asks for no key" not in s.stderr()
        assert s.stop() == 0
    done = subprocess.run([*module, "--model", MODEL, "--tensor-parallel-size", "4"], env=clean_env(env), capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 2 and "not built yet" in done.stderr, done
    done = subprocess.run([*module, "--help=host"], env=clean_env(env), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "ERNEST_HOST (now 0.0.0.0)" in done.stdout, done
    env["ERNEST_BIN"] = "/nonexistent"
    done = subprocess.run(module, env=clean_env(env), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "ERNEST_BIN" in done.stderr, done


if __name__ == "__main__":
    main(says_eight_lines, says_when_a_weight_file_is_cut, tells_the_model_it_was_given_alone, says_what_changes_nothing,
         tells_what_the_config_says_beyond_us, makes_a_large_model_in_little_memory, collects_what_a_report_needs,
         own_server_has_the_clients_key, logs_what_scripts_look_for, warns_when_open, serves_beyond_the_soft_limit,
         first_signal_drains, second_signal_hurries,
         drain_has_a_limit, stops_while_loading, plans_and_prints, says_what_the_cache_is_without, tells_the_pages_of_prompts,
         plans_the_tiers, documents_itself, makes_a_model_or_nothing, tokenizes,
         takes_logprobs_from, talks_in_the_terminal, ctrl_c_stops_an_answer, chats_with_a_folder,
         answers_to_fastdeploys_name)
