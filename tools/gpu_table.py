#!/usr/bin/env python3
"""The table of what the cuda backend must reach, filled in on this machine: gpu_table.py BUILD DIR [--runs N] [--shapes 0.3b,21b-a3b]

BUILD: a built tree (ernest, gpu_limits). DIR: where made models are (DIR/SHAPE-WEIGHTS); what is missing is made there
(21b-a3b: 44 GB in bf16, 34 quantized) and stays. A floor is the slower of moving the counted bytes at the read bandwidth and
doing the counted operations at the rate of bf16 products (twice that for fp8 weights), both measured in the same run; a row's
figure is floor over time, and of several runs the worst counts. Exit code 1 when a row misses what it must reach."""
import argparse
import os
import re
import subprocess
import sys

INT4 = '{"quantization":"mix_quant","dense_quant_type":"wint4","moe_quant_type":"wint4"}'
NAMES = {"bf16": "none", "wint8": "wint8", "wint4": "wint4", "fp8": "block_wise_fp8", "int4": INT4}
# shape and context: weights, "decode" and batches or "prefill" and lengths, must and aim in percent of the floor
ROWS = {
    ("0.3b", 1024): [
        ("bf16", "decode", (1,), 40, 65), ("wint8", "decode", (1,), 30, 55), ("int4", "decode", (1,), 19, 40),
        ("bf16", "decode", (256,), 50, 75), ("bf16", "prefill", (8192, 32768), 45, 70),
    ],
    ("21b-a3b", 4096): [
        ("bf16", "decode", (1,), 62, 85), ("bf16", "decode", (8, 32), 65, 85), ("bf16", "decode", (128,), 65, 87), ("bf16", "prefill", (8192,), 50, 75),
        ("fp8", "decode", (1,), 52, 77), ("fp8", "decode", (8, 32), 58, 85), ("fp8", "prefill", (8192,), 40, 65),
        ("wint4", "decode", (1,), 46, 73), ("wint4", "decode", (8, 32), 50, 85), ("wint4", "prefill", (8192,), None, None),  # against bf16's time
    ],
}
LINE = re.compile(r"^(decode b=(\d+) ctx=\d+|prefill (\d+)) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) ")


def limits(build):
    out = subprocess.run([f"{build}/gpu_limits"], check=True, capture_output=True, text=True).stdout
    read = float(re.search(r"read +2048 MiB +([\d.]+)", out)[1]) * 1e12
    rate = float(re.search(r"([\d.]+) TFLOP/s, m64n128k16", out)[1]) * 1e12
    print(out.splitlines()[0] + f": reads {read * 1e-12:.2f} TB/s, bf16 {rate * 1e-12:.0f} TFLOP/s", flush=True)
    return read, rate


def model_of(build, folder, shape, weights):
    path = f"{folder}/{shape}-{weights}"
    if not os.path.exists(f"{path}/config.json"):
        command = [f"{build}/ernest", "make-model", "--shape", shape, "--layout", "pt", "--seed", "7", "--out", path, "--quantization", NAMES[weights]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def measure(build, model, context, rows):
    """{("decode" or "prefill", batch or length): (tokens/s, seconds, bytes, operations)}"""
    want = {(kind, size) for _, kind, sizes, _, _ in rows for size in sizes}
    sizes = {kind: ",".join(str(s) for k, s in sorted(want) if k == kind) for kind in ("decode", "prefill")}
    command = [f"{build}/ernest", "bench", "step", "--backend", "cuda", "--model", model, "--rounds", "3", "--max-num-batched-tokens", "8192",
               "--context", str(context), "--batch", sizes["decode"] or "1", "--prompt", sizes["prefill"] or "0"]
    run = subprocess.run(command, capture_output=True, text=True)
    found = {}
    for m in filter(None, map(LINE.match, run.stdout.splitlines())):
        found["decode" if m[2] else "prefill", int(m[2] or m[3])] = (float(m[4]), float(m[5]) * 1e-3, float(m[6]) * 1e6, float(m[7]) * 1e9)
    if run.returncode or not want <= set(found):
        sys.exit(f"gpu_table: {' '.join(command)}: exit code {run.returncode}\n{run.stdout}{run.stderr}")
    return found


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("build")
    a.add_argument("dir")
    a.add_argument("--runs", type=int, default=3)
    a.add_argument("--shapes", default="0.3b,21b-a3b")
    o = a.parse_args()
    worst, bf16_s = {}, {}
    for (shape, context), rows in ((k, r) for k, r in ROWS.items() if k[0] in o.shapes.split(",")):
        for weights in dict.fromkeys(r[0] for r in rows):
            model, mine = model_of(o.build, o.dir, shape, weights), [r for r in rows if r[0] == weights]
            for _ in range(o.runs):
                read, rate = limits(o.build)
                found = measure(o.build, model, context, mine)
                for row in mine:
                    for size in row[2]:
                        tokens, took, n_bytes, n_op = found[row[1], size]
                        floor = max(n_bytes / read, n_op / (rate * (2 if weights == "fp8" else 1)))
                        at = (shape, context, row, size)
                        if weights == "bf16":
                            bf16_s[shape, row[1], size] = max(took, bf16_s.get((shape, row[1], size), 0))
                        if at not in worst or floor / took < worst[at][0]:
                            worst[at] = (floor / took, tokens, took, floor)
    missed = 0
    print(f"\n{'work':42} {'tokens/s':>10} {'ms':>9} {'floor ms':>9} {'of floor':>9}  must  aim")
    for (shape, context, (weights, kind, _, must, aim), size), (share, tokens, took, floor) in worst.items():
        name = f"{shape} {weights} {kind} {size}" + (f", context {context}" if kind == "decode" else "")
        times = took / bf16_s[shape, kind, size] if not must else 0
        missed += share * 100 < must if must else times > 1.25
        end = f"{must:4}% {aim:3}%" if must else f"{times:.2f}x the time of bf16 (must 1.25, aim 1.05)"
        bad = "  MISSED" if (share * 100 < must if must else times > 1.25) else ""
        print(f"{name:42} {tokens:10.0f} {took * 1e3:9.3f} {floor * 1e3:9.3f} {share:8.0%}  {end}{bad}")
    print(f"{len(worst)} rows, {missed} missed; of {o.runs} runs the worst each")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
