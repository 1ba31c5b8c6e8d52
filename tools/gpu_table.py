#!/usr/bin/env python3
"""The table of what the cuda backend must reach, filled in on this machine:

    gpu_table.py BUILD DIR [--runs N] [--shapes 0.3b,21b-a3b] [--rows WORD,WORD] [--drop] [--cupti DIR]

BUILD: a built tree (ernest, gpu_limits, libgpu_timeline.so). DIR: where made models are (DIR/SHAPE-WEIGHTS); what is missing is
made there (21b-a3b: 44 GB in bf16, 34 quantized) and stays; with --drop each goes when its rows are done. --rows: only rows whose
names hold one of the words. --cupti: the folder of libcupti.so, where it is not the toolkit's usual one.

What a row is held against:
  decode           its floor: the slower of moving the counted bytes at the read bandwidth and doing the counted operations at
                   the rate of bf16 products (that of fp8 products for fp8 weights). The figure is floor over time.
  prefill          the same, operator by operator, one after the other: attention is of bf16 whatever the weights are. Of the
                   last layer nobody needs more than keys and values of the rows that are not wanted: no more is counted
  8-bit, 4-bit     the time of bf16 at the same work
  serving          over HTTP, on loopback, S streams of IN + OUT tokens. The floor is that all S requests of a wave are prefilled
                   and then decoded together, each as prefill is counted:
                   S * OUT / (S * prefill(IN) + OUT * decode(S rows, IN + OUT/2 tokens of context))
  idle             from the last kernel of a step to the first of the next, as libgpu_timeline.so saw them, over the step's
                   time untraced
  sampling         the sampler's time by the same timeline, over the step's, top-k, top-p and all penalties on
  waits            99th percentile over median of the time between two tokens of 16 streams while prompts of 8192 tokens
                   arrive, several a second
  start            from the start of the process to the first token of a request, the checkpoint in the page cache
Bandwidth and both rates are measured in the same run, by gpu_limits: products of warpgroups on random numbers, sustained. Of several runs the worst counts. Exit code 1 when a row misses
what it must reach or could not be run. Every process that is started is ended, after an error too, and has a time limit."""
import argparse
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

INT4 = '{"quantization":"mix_quant","dense_quant_type":"wint4","moe_quant_type":"wint4"}'
NAMES = {"bf16": "none", "wint8": "wint8", "wint4": "wint4", "fp8": "block_wise_fp8", "int4": INT4}
# Bytes of a weight: attention and dense or shared feed-forward, experts. wint4 keeps the former in 8 bits; the head is bf16.
BYTES = {"bf16": (2, 2), "wint8": (1, 1), "fp8": (1 + 4 / 128**2, 1 + 4 / 128**2), "wint4": (1, 0.5), "int4": (0.5, 0.5)}
CONTEXT = {"0.3b": 1024, "21b-a3b": 4096}
# weights, kind, sizes, must, aim. Of decode (batches) and prefill (lengths) and serving ((streams, in, out)): percent of the floor;
# times: of bf16's time, at most; idle, sampling (batches): percent of the step, at most; waits ((streams, prompts a second,
# tokens a stream)): times, at most; start: seconds, at most.
ROWS = {
    "0.3b": [
        ("bf16", "decode", (1,), 40, 65), ("bf16", "decode", (256,), 50, 75), ("bf16", "prefill", (8192, 32768), 45, 70),
        ("bf16", "idle", (1,), 5, 1), ("bf16", "sampling", (256,), 5, 2),
        ("bf16", "serving", ((256, 1024, 128),), 35, 60), ("bf16", "waits", ((16, 12, 3000),), 4, 2),
        ("wint8", "decode", (1,), 30, 55), ("wint8", "start", (1,), 5, 2), ("int4", "decode", (1,), 19, 40),
    ],
    "21b-a3b": [
        ("bf16", "decode", (1,), 62, 85), ("bf16", "decode", (8, 32), 65, 85), ("bf16", "decode", (128, 256), 65, 87),
        ("bf16", "prefill", (8192,), 50, 75), ("bf16", "serving", ((256, 1024, 1024),), 45, 70),
        ("fp8", "decode", (1,), 52, 77), ("fp8", "decode", (8, 32), 58, 85), ("fp8", "decode", (128, 256), 65, 87),
        ("fp8", "prefill", (8192,), 40, 65), ("fp8", "serving", ((256, 1024, 1024),), 45, 70),
        ("fp8", "idle", (1,), 5, 1), ("fp8", "waits", ((16, 4, 1500),), 4, 2),
        ("wint8", "decode", (1,), 52, 77), ("wint8", "decode", (128, 256), 65, 87), ("wint8", "times", ((8192,),), 1.25, 1.05),
        ("wint4", "decode", (1,), 46, 73), ("wint4", "decode", (8, 32), 50, 85), ("wint4", "decode", (128, 256), 65, 87),
        ("wint4", "times", ((8192,),), 1.25, 1.05), ("wint4", "start", (1,), 30, 12),
    ],
}
LINE = re.compile(r"^(decode b=(\d+) ctx=\d+|prefill (\d+)) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) ")
STEPS = re.compile(r"timeline: \d+ steps of \d+ rows, ([\d.]+) us each, ([\d.]+) us from")
KERNEL = re.compile(r"timeline: +([\d.]+) x +[\d.]+ us +([\d.]+) us  (\w+)")
SAMPLERS = ("sample_kernel", "stream_kernel")  # of rules other than arg-max; a step has one of them or both
CHUNK = 8192  # rows of a full step
SERVED, CLIENT_S, START_S = 8, 150, 240  # waves of short replies; limits of a load and of a start


def say(text):
    print(text, flush=True)


def limits(o):
    out = subprocess.run([f"{o.build}/gpu_limits"], check=True, capture_output=True, text=True, timeout=60).stdout
    o.read = float(re.search(r"read +2048 MiB +([\d.]+)", out)[1]) * 1e12
    o.rate = float(re.search(r"([\d.]+) TFLOP/s, m64n128k16", out)[1]) * 1e12
    o.rate8 = float(re.search(r"([\d.]+) TFLOP/s, m64n128k32", out)[1]) * 1e12
    say(out.splitlines()[0] + f": reads {o.read * 1e-12:.2f} TB/s, bf16 {o.rate * 1e-12:.0f} TFLOP/s, fp8 {o.rate8 * 1e-12:.0f}")


def model_of(o, shape, weights):
    path = f"{o.dir}/{shape}-{weights}"
    if not os.path.exists(f"{path}/config.json"):
        command = [f"{o.build}/ernest", "make-model", "--shape", shape, "--layout", "pt", "--seed", "7", "--out", path, "--quantization", NAMES[weights]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    return path


# ---- steps ----------------------------------------------------------------------------------------------------------


class CannotRun(Exception):
    pass


def bench_step(o, model, context, batches, prompts, more=(), env=None):
    command = [f"{o.build}/ernest", "bench", "step", "--backend", "cuda", "--model", model, "--max-num-batched-tokens", str(CHUNK), "--context", str(context),
               "--batch", ",".join(map(str, batches)) or "1", "--prompt", ",".join(map(str, prompts)) or "0", *more]
    run = subprocess.run(command, capture_output=True, text=True, timeout=START_S, env=env)
    if run.returncode:
        raise CannotRun(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit code {run.returncode}")
    return run


def steps(o, model, context, batches, prompts):
    """{("decode" or "prefill", batch or length): (tokens/s, seconds, bytes, operations)}; a batch that finds no memory is left out."""
    while True:
        try:
            run = bench_step(o, model, context, batches, prompts, ("--rounds", "3"))
            break
        except CannotRun as why:
            if len(batches) < 2 or "MiB" not in str(why):
                raise
            batches = batches[:-1]
    return {("decode" if m[2] else "prefill", int(m[2] or m[3])): (float(m[4]), int(m[2] or m[3]) / float(m[4]), float(m[6]) * 1e6, float(m[7]) * 1e9)
            for m in filter(None, map(LINE.match, run.stdout.splitlines()))}


def timeline(o, model, context, batch, more=()):
    """(us a step, us between steps, {kernel: us of a step})"""
    found = [o.cupti] if o.cupti else [os.path.dirname(p) for p in sorted(
        glob.glob("/usr/local/cuda*/lib64/libcupti.so.*") + glob.glob("/usr/local/cuda*/extras/CUPTI/lib64/libcupti.so.*")
        + glob.glob("/usr/lib/x86_64-linux-gnu/libcupti.so.*"), reverse=True)][:1]
    library = f"{os.path.abspath(o.build)}/libgpu_timeline.so"
    if not os.path.exists(library):
        raise CannotRun("libgpu_timeline.so was not built: the toolkit's CUPTI was not found")
    env = dict(os.environ, CUDA_INJECTION64_PATH=library, LD_LIBRARY_PATH=":".join(found + [os.environ.get("LD_LIBRARY_PATH", "")]).strip(":"))
    said = bench_step(o, model, context, (batch,), (), ("--rounds", "1", *more), env).stderr
    total = STEPS.search(said)
    if not total:
        raise CannotRun("the timeline saw no steps; name the folder of libcupti.so with --cupti")
    kernels = {}
    for m in KERNEL.finditer(said):
        kernels[m[3]] = kernels.get(m[3], 0) + float(m[1]) * float(m[2])
    return float(total[1]), float(total[2]), kernels


# ---- floors, operator by operator -----------------------------------------------------------------------------------


def operators(model, weights, rows, wanted, reads, pairs):
    """(bytes, operations, may be fp8) of each operator of one step: rows of tokens, wanted rows (each the last of its sequence),
    tokens whose keys and values are read, and (row, visible token) pairs."""
    with open(f"{model}/config.json") as f:
        c = json.load(f)
    D, L, V, C = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"], c["head_dim"]
    H, G, E, K = c["num_attention_heads"], c["num_key_value_heads"], c.get("moe_num_experts", 0), c.get("moe_k", 0)
    dense, routed = BYTES[weights]
    first = c["moe_layer_start_index"] if E else L
    linear = lambda n, of: (n * dense if of else 0, 2 * n * of, weights == "fp8")
    ops = []
    for layer in range(L):
        last = reads if wanted else 0  # a wanted row sees all of its sequence
        of, seen, seen_by = (rows, reads, pairs) if layer < L - 1 else (wanted, last, last)
        ops += [linear(2 * D * G * C, rows), linear(D * H * C, of), (2 * seen * 2 * G * C, 4 * seen_by * H * C, False), linear(H * C * D, of)]
        if layer < first:
            ops.append(linear(3 * D * c["intermediate_size"], of))
            continue
        expert = 3 * D * c["moe_intermediate_size"]
        touched = E * (1 - (1 - K / E) ** of)
        ops += [(4 * E * D if of else 0, 2 * E * D * of, False), (touched * expert * routed, 2 * expert * K * of, weights == "fp8"),
                linear(c["moe_num_shared_experts"] * expert, of)]
    return ops + [(2 * V * D if wanted else 0, 2 * V * D * wanted, False)]


def floor_s(o, ops):
    return sum(max(n_bytes / o.read, n_op / (o.rate8 if fp8 else o.rate)) for n_bytes, n_op, fp8 in ops)


def prefill_floor(o, model, weights, n):
    """Seconds of a prompt of n tokens, a full step after another."""
    s = 0
    for at in range(0, n, CHUNK):
        rows = min(CHUNK, n - at)
        s += floor_s(o, operators(model, weights, rows, int(at + rows == n), at + rows, rows * at + rows * (rows + 1) / 2))
    return s


def serving_floor(o, model, weights, streams, n_in, n_out):
    """Output tokens a second. Prompts are prefilled in full steps, each prompt seeing itself alone."""
    packed = CHUNK // n_in or 1
    prefill = floor_s(o, operators(model, weights, packed * n_in, packed, packed * n_in, packed * n_in * (n_in + 1) / 2)) / packed
    context = n_in + n_out // 2
    decode = floor_s(o, operators(model, weights, streams, streams, streams * context, streams * context))
    return streams * n_out / (streams * prefill + n_out * decode)


# ---- servers --------------------------------------------------------------------------------------------------------


def too_late(*_):
    raise CannotRun(f"the server was not ready in {START_S} s")


class Server:
    """ernest serve on a free port of loopback, ready when the block begins and gone when it ends."""

    def __init__(self, o, model, *flags):
        self.command = [f"{o.build}/ernest", "serve", "--backend", "cuda", "--model", model, "--port", "0", "--log-level", "error", *flags]

    def __enter__(self):
        read, write = os.pipe()
        self.log = tempfile.TemporaryFile()
        self.begin = time.monotonic()
        self.process = subprocess.Popen([*self.command, "--ready-fd", str(write)], pass_fds=(write,), stdout=self.log, stderr=self.log)
        os.close(write)
        signal.alarm(START_S)
        try:
            with os.fdopen(read) as ready:
                self.url = ready.readline().strip()
        except BaseException:  # too late, or this program is to end: nobody else will end the server
            self.__exit__()
            raise
        finally:
            signal.alarm(0)
        if not self.url:
            self.__exit__()
            self.log.seek(0)
            raise CannotRun("the server did not start: " + (self.log.read().decode(errors="replace").strip().splitlines() or ["no reason given"])[-1])
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def load(self, o, folder, name, streams, n, n_in, n_out, *more):
        """A running ernest bench serve, whose results will be in folder/name."""
        command = [f"{o.build}/ernest", "bench", "serve", "--base-url", self.url, "--max-concurrency", str(streams), "--num-prompts", str(n), "--input-len", str(n_in),
                   "--output-len", str(n_out), "--ignore-eos", "--time-limit", str(CLIENT_S), "--result-dir", folder, "--result-filename", name, *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def result(process, folder, name):
    """What a load found, once it has ended."""
    _, said = process.communicate(timeout=CLIENT_S + 30)
    if process.returncode:
        raise CannotRun("the load failed: " + (said.strip().splitlines() or ["no reason given"])[-1])
    with open(f"{folder}/{name}") as f:
        found = json.load(f)
    if found["failed"]:
        raise CannotRun(f"{found['failed']} requests failed")
    return found


def end(process):
    if process.poll() is None:
        process.kill()
    process.communicate()


def serve(o, model, streams, n_in, n_out):
    """Output tokens a second of whole waves of requests: one of long replies, several of short ones."""
    waves = max(1, SERVED * 128 // n_out)
    with Server(o, model, "--max-model-len", str(n_in + n_out + 64), "--max-num-seqs", str(streams)) as s, tempfile.TemporaryDirectory() as folder:
        p = s.load(o, folder, "r", streams, waves * streams, n_in, n_out, "--num-warmups", "2")
        try:
            return result(p, folder, "r")["output_throughput"]
        finally:
            end(p)


def waits(o, model, streams, per_s, n_out):
    """p99 over p50, and both in ms."""
    with Server(o, model, "--max-model-len", "8448", "--max-num-seqs", str(2 * streams)) as s, tempfile.TemporaryDirectory() as folder:
        replies = s.load(o, folder, "r", streams, streams, 64, n_out, "--num-warmups", "1")
        try:
            prompts = s.load(o, folder, "p", streams, 100000, 8192, 1, "--num-warmups", "1", "--request-rate", str(per_s), "--burstiness", "10", "--seed", "1")
            try:
                r = result(replies, folder, "r")
                if prompts.poll() is not None:
                    raise CannotRun("the prompts ended before the replies did")
            finally:
                end(prompts)
        finally:
            end(replies)
        return r["p99_itl_ms"] / r["median_itl_ms"], r["median_itl_ms"], r["p99_itl_ms"]


def start(o, model):
    """Seconds from the start of the process to the first token."""
    for path in glob.glob(f"{model}/*.safetensors"):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True, timeout=600)
    with Server(o, model, "--max-model-len", "8192") as s:
        body = json.dumps({"prompt": [11, 12, 13], "max_tokens": 1}).encode()
        request = urllib.request.Request(s.url + "/v1/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()
        return time.monotonic() - s.begin


# ---- the table ------------------------------------------------------------------------------------------------------


def name_of(shape, weights, kind, size):
    work = {"decode": f"decode {size}, context {CONTEXT[shape]}", "prefill": f"prefill {size}", "times": "prefill, times bf16", "start": "start to first token",
            "idle": f"idle between steps, batch {size}", "sampling": f"sampling, batch {size}"}
    if kind == "serving":
        return f"{shape} {weights} serving {size[0]} x ({size[1]} + {size[2]})"
    return f"{shape} {weights} " + (f"waits of {size[0]} beside prompts" if kind == "waits" else work[kind])


def one_row(o, model, shape, weights, kind, size, found, bf16_s):
    """(figure, what was measured, in words); the figure is in the unit of must and aim."""
    context = CONTEXT[shape]
    if kind in ("decode", "prefill"):
        if (kind, size) not in found:
            raise CannotRun("finds no memory on this GPU")
        tokens, took, n_bytes, n_op = found[kind, size]
        if kind == "prefill":
            floor = prefill_floor(o, model, weights, size)
        else:
            floor = max(n_bytes / o.read, n_op / (o.rate8 if weights == "fp8" else o.rate))
        return 100 * floor / took, f"{tokens:,.0f} tokens/s, {took * 1e3:.3f} ms, floor {floor * 1e3:.3f}"
    if kind == "times":
        took, of = found["prefill", size[0]][1], bf16_s.get((shape, size[0]))
        if not of:
            raise CannotRun("bf16's row was not run")
        return took / of, f"{took * 1e3:.2f} ms at {size[0]}, bf16 {of * 1e3:.2f}"
    if kind == "serving":
        floor, got = serving_floor(o, model, weights, *size), serve(o, model, *size)
        return 100 * got / floor, f"{got:,.0f} tokens/s, {got / size[2]:.0f} requests/s, floor {floor:,.0f}"
    if kind == "idle":
        step_us, between_us, _ = timeline(o, model, context, size)
        step_us = found["decode", size][1] * 1e6 if ("decode", size) in found else step_us
        return 100 * between_us / step_us, f"{between_us:.2f} us of {step_us:.1f}"
    if kind == "sampling":
        step_us, _, kernels = timeline(o, model, context, size, ("--sampled",))
        sampler_us = sum(kernels.get(k, 0) for k in SAMPLERS)
        if not sampler_us:
            raise CannotRun(f"none of the kernels is called {' or '.join(SAMPLERS)}")
        return 100 * sampler_us / step_us, f"{sampler_us:.1f} us of {step_us:.1f}"
    if kind == "waits":
        ratio, median, p99 = waits(o, model, *size)
        return ratio, f"median {median:.2f} ms, p99 {p99:.2f}"
    seconds = start(o, model)
    return seconds, f"{seconds:.2f} s, graphs of all batches made"


def run_once(o, shape, weights, rows, worst, bf16_s):
    model = model_of(o, shape, weights)
    limits(o)
    batches = sorted({s for _, kind, sizes, _, _ in rows for s in sizes if kind in ("decode", "idle")})
    prompts = sorted({s[0] if kind == "times" else s for _, kind, sizes, _, _ in rows for s in sizes if kind in ("prefill", "times")})
    found, no_steps = {}, None
    try:
        found = steps(o, model, CONTEXT[shape], batches, prompts) if batches or prompts else {}
    except (CannotRun, subprocess.SubprocessError) as why:
        no_steps = why
    for (kind, size), value in found.items():
        if weights == "bf16" and kind == "prefill":
            bf16_s[shape, size] = max(value[1], bf16_s.get((shape, size), 0))
    for row in rows:
        for size in row[2]:
            name, at_least = name_of(shape, weights, row[1], size), row[1] in ("decode", "prefill", "serving")
            try:
                if no_steps and row[1] in ("decode", "prefill", "times"):
                    raise CannotRun(str(no_steps))
                figure, words = one_row(o, model, shape, weights, row[1], size, found, bf16_s)
            except (CannotRun, subprocess.SubprocessError, OSError, KeyError, ZeroDivisionError) as why:
                figure, words = None, f"not run: {str(why)[:150]}"
            say(f"  {name}: {words}")
            known = worst.get(name)
            if not known or (known[0] is not None and (figure is None or (figure < known[0]) == at_least)):
                worst[name] = (figure, words, row[1], row[3], row[4])


def show(worst, runs):
    unit = {"decode": "%", "prefill": "%", "serving": "%", "idle": "%", "sampling": "%", "start": " s"}
    missed = 0
    print(f"\n{'work':44} {'figure':>9} {'must':>8} {'aim':>7}         measured")
    for name, (figure, words, kind, must, aim) in worst.items():
        at_least, u = kind in ("decode", "prefill", "serving"), unit.get(kind, "x")
        bad = figure is None or (figure < must if at_least else figure > must)
        good = figure is not None and (figure >= aim if at_least else figure <= aim)
        missed += bad
        value = "-" if figure is None else f"{figure:.0f}{u}" if at_least else f"{figure:.2f}{u}"
        sign = ">=" if at_least else "<="
        print(f"{name:44} {value:>9} {sign + str(must) + u:>8} {str(aim) + u:>7} {'MISSED' if bad else 'aim' if good else 'ok':>7} {words}")
    print(f"{len(worst)} rows, {missed} missed; of {runs} runs the worst each")
    return missed > 0


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("build")
    a.add_argument("dir")
    a.add_argument("--runs", type=int, default=3)
    a.add_argument("--shapes", default="0.3b,21b-a3b")
    a.add_argument("--rows", default="")
    a.add_argument("--drop", action="store_true")
    a.add_argument("--cupti", default="")
    o = a.parse_args()
    signal.signal(signal.SIGALRM, too_late)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    worst, bf16_s, words = {}, {}, [w for w in o.rows.split(",") if w] or [""]
    for shape in o.shapes.split(","):
        asked = [(w, kind, tuple(s for s in sizes if any(word in name_of(shape, w, kind, s) for word in words)), must, aim)
                 for w, kind, sizes, must, aim in ROWS[shape]]
        for weights in dict.fromkeys(r[0] for r in asked if r[2]):
            for _ in range(o.runs):
                run_once(o, shape, weights, [r for r in asked if r[0] == weights and r[2]], worst, bf16_s)
            if o.drop:
                shutil.rmtree(f"{o.dir}/{shape}-{weights}")
    return show(worst, o.runs)


if __name__ == "__main__":
    sys.exit(main())
