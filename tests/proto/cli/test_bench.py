#!/usr/bin/env python3
"""The benchmarks run to their end and say what they promise; no speed is asserted."""
import csv
import json
import os
import socket
import xml.etree.ElementTree

from harness import SLOW, Server, made_model, main, run, scratch

DENSE, MOE = made_model(), made_model("tiny-moe")


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    for r in rows:
        assert None not in r and None not in r.values(), r  # as many fields as the heading
        assert r["date"] and r["commit"] and r["machine"] and r["cores"] and r["command"].startswith("ernest bench "), r
        assert float(r["value"]) > 0 and r["unit"], r
    return rows


def says_the_limits():
    path = os.path.join(scratch, "limits.csv")
    for _ in range(2):  # the second run appends
        code, out, err, _ = run(["bench", "limits", "--quick", "--rounds", "2", "--threads", "2", "--save-csv", path, "--commit", "abc"],
                                timeout=120 * SLOW)
        assert code == 0, err
        assert "read" in out and "GB/s" in out, out
        for kind in ("fma f32", "vnni int8", "amx bf16", "amx int8"):  # measured, or said why not
            lines = [line for line in out.splitlines() if kind in line]
            assert lines and (any("TOP/s" in line or "GOP/s" in line for line in lines) or "not measured: " in lines[0]), out
    rows = rows_of(path)
    assert len(rows) % 2 == 0 and all(r["commit"] == "abc" for r in rows)
    assert any(r["row"].startswith("read 64") and r["threads"] == "2" and r["unit"] == "GB/s" for r in rows), rows


def says_the_steps():
    path = os.path.join(scratch, "step.csv")
    for model in (DENSE, MOE):
        code, out, err, _ = run(["bench", "step", "--model", model, "--quick", "--rounds", "2", "--batch", "1,3", "--context", "5,70",
                                 "--prompt", "9,130", "--max-num-batched-tokens", "64", "--job", "2,20,5", "--save-csv", path], timeout=120 * SLOW)
        assert code == 0, err
        assert "decode b=3 ctx=70" in out and "prefill 130" in out and "tokens/s" in out, out
        assert ("experts touched" in out) == (model == MOE), out
    jobs, rows = [[r for r in rows_of(path) if ("job" in r["row"].split()) == is_job] for is_job in (True, False)]
    assert len(rows) == 12 and len(jobs) == 2 and jobs[0]["row"].endswith("job 2 x (20 + 5), best"), (rows, jobs)
    assert all(float(r["bytes"]) > 0 and float(r["operations"]) > 0 and float(r["fraction"]) > 0 and r["limit"] for r in rows)
    more = {r["row"].split(", ")[-1]: float(r["bytes"]) for r in rows[:6]}  # a longer context and a larger batch read more
    assert more["decode b=1 ctx=70"] > more["decode b=1 ctx=5"] and more["decode b=3 ctx=5"] > more["decode b=1 ctx=5"], more


def fills_the_table():
    code, out, err, _ = run(["bench", "step", DENSE, "--table", "--quick", "--rounds", "1"], timeout=300 * SLOW)
    assert code == 0, err
    assert "worst of 1 runs" in out and "must" in out and "one core busy" in out, out


def says_the_kernels():
    path = os.path.join(scratch, "kernels.csv")
    code, out, err, _ = run(["bench", "kernels", "--quick", "--rounds", "1", "--save-csv", path], timeout=240 * SLOW)
    assert code == 0, err
    names = {r["row"].split(", ")[0] for r in rows_of(path)}
    assert {"linear bf16 pt", "linear bf16 paddle", "linear int8", "linear int4", "linear fp8", "linear int8 on f32", "norm", "silu_mul",
            "softmax", "attn bf16", "attn int8", "attn join"} <= names, names
    assert {r["row"].split(", ")[1] for r in rows_of(path)} >= {"portable"}


def result(name):
    with open(os.path.join(scratch, name), encoding="utf-8") as f:
        return json.load(f)


def loads_a_server():
    with Server("--model", DENSE) as s:
        base = ["bench", "serve", "--base-url", s.url, "--num-prompts", "9", "--random-input-len", "12", "--random-output-len", "6",
                "--ignore-eos", "--result-dir", scratch]
        code, out, err, _ = run([*base, "--max-concurrency", "4", "--save-result", "--save-detailed", "--result-filename", "one.json",
                                 "--goodput", "ttft:60000,tpot:60000", "--metric-percentiles", "50,99"], timeout=120 * SLOW)
        assert code == 0, err
        assert "TTFT" in out and "output tokens/s" in out, out
        r = result("one.json")
        assert r["completed"] == 9 and r["failed"] == 0 and r["total_input_tokens"] == 9 * 12 and r["total_output_tokens"] == 9 * 6, r
        assert r["max_concurrency"] == 4 and 1 <= r["max_concurrent_requests"] <= 4 and r["request_rate"] == "inf"
        assert abs(r["output_throughput"] * r["duration"] - 54) < 1e-6 and abs(r["request_goodput"] * r["duration"] - 9) < 1e-6
        for m in ("ttft", "tpot", "itl", "e2el"):
            for f in ("mean", "median", "std", "p50", "p99"):
                assert r[f"{f}_{m}_ms"] >= 0, (m, f)
            assert r[f"median_{m}_ms"] == r[f"p50_{m}_ms"] <= r[f"p99_{m}_ms"]
        assert r["input_lens"] == [12] * 9 and r["output_lens"] == [6] * 9 and len(r["itls"]) == 9 and r["errors"] == [""] * 9

        # open loop, lengths that vary, chats, a sweep with its plot
        code, out, err, _ = run([*base, "--request-rate", "200", "--burstiness", "0.5", "--random-range-ratio", "0.5", "--seed", "3",
                                 "--save-detailed", "--result-filename", "open.json"], timeout=120 * SLOW)
        assert code == 0, err
        r = result("open.json")
        assert r["completed"] == 9 and r["request_rate"] == 200 and len(set(r["input_lens"])) > 1
        assert all(6 <= n <= 18 for n in r["input_lens"]) and all(3 <= n <= 9 for n in r["output_lens"]), r
        plot = os.path.join(scratch, "plot.svg")
        code, out, err, _ = run([*base, "--backend", "openai-chat", "--sweep", "1,3", "--result-filename", "sweep.json", "--plot", plot,
                                 "--save-csv", os.path.join(scratch, "serve.csv")], timeout=120 * SLOW)
        assert code == 0, err
        assert [(r["max_concurrency"], r["completed"]) for r in result("sweep.json")] == [(1, 9), (3, 9)]
        assert xml.etree.ElementTree.parse(plot).getroot().tag.endswith("svg")
        assert any("3 at once, TTFT p99" in r["row"] for r in rows_of(os.path.join(scratch, "serve.csv")))

        # a file, and requests that the server refuses
        data = os.path.join(scratch, "prompts.jsonl")
        with open(data, "w", encoding="utf-8") as f:
            f.write('Once upon a time\n{"prompt": "Two", "max_tokens": 2}\n{"prompt": "Bad", "max_tokens": 99999999}\n')
        code, out, err, _ = run([*base[:4], "--num-prompts", "6", "--num-warmups", "0", "--random-output-len", "3", "--ignore-eos",
                                 "--dataset-name", "file", "--dataset-path", data, "--save-detailed", "--result-dir", scratch,
                                 "--result-filename", "file.json"], timeout=120 * SLOW)
        assert code == 0, err
        r = result("file.json")
        assert r["completed"] == 4 and r["failed"] == 2 and r["output_lens"] == [3, 2, 0, 3, 2, 0], r
        assert "max_tokens" in r["errors"][2] and "the first failure: " in out, (r["errors"], out)
        assert s.stop() == 0


def refuses_in_a_sentence():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])  # bound and not listening: nobody answers
        for line, code, words in (
                (["serve", "--port", port], 1, "no server"),
                (["serve", "--port", port, "--model", "m", "--num-warmups", "0", "--num-prompts", "2"], 1, "no server"),
                (["serve", "--request-rate", "0"], 2, "--request-rate"),
                (["serve", "--goodput", "itl:5"], 2, "--goodput"),
                (["serve", "--sweep", "1,x"], 2, "--sweep"),
                (["serve", "--model", "m", "--dataset-name", "file"], 2, "--dataset-path"),
                (["serve", "--base-url", "nowhere", "--model", "m"], 2, "--base-url"),
                (["step"], 2, "--model"),
                (["step", DENSE, "--batch", "0"], 2, "--batch"),
                (["step", DENSE, "--job", "16,256"], 2, "--job"),
                (["step", DENSE, "--context", "999999"], 2, "--context"),
                (["kernels", "--quick", "--filter", "nothing like it"], 2, "--filter"),
                (["limits", "--save-csv", os.path.join(DENSE, "config.json"), "--quick"], 2, "heading"),
                (["everything"], 2, "limits, step, serve or kernels"),
                ([], 2, "bench KIND --help")):
            got, out, err, _ = run(["bench", *line], timeout=60 * SLOW)
            assert got == code and words in err and len(err) < 1000 or not line and words in err, (line, got, out, err)
    for kind in ("limits", "step", "serve", "kernels"):
        for line in (["bench", kind, "--help"], ["help", "bench", kind]):
            got, out, err, _ = run(line)
            assert got == 0 and out.startswith(f"usage: ernest bench {kind} ") and "--save-csv" in out, (line, out, err)


if __name__ == "__main__":
    main(says_the_limits, says_the_steps, fills_the_table, says_the_kernels, loads_a_server, refuses_in_a_sentence)
