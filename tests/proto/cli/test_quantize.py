"""Quantized weights from outside: the three ways to them serve the same replies, and quantize keeps to its bounds."""
import filecmp
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from harness import BIN, SLOW, Server, clean_env, made_model, main, run, scratch  # noqa: E402

ALL_INT4 = '{"quantization":"mix_quant","dense_quant_type":"wint4"}'
FORMATS = {"wint8": "wint8, head wint8", "wint4": "wint4 (dense wint8, experts wint4), head wint8",
           "block_wise_fp8": "block_wise_fp8, head wint8",
           ALL_INT4: "mix_quant (dense wint4, experts wint4), head wint8"}


def new_folder():
    return tempfile.mktemp(prefix="quantized-", dir=scratch)


def reply(server):
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0, "logprobs": 1, "return_token_ids": True}
    answer = json.load(server.post("/v1/completions", body))
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]


def weights_line(text):
    return [line for line in text.split("\n") if line.startswith("weights")][0]


def three_ways_serve_the_same():
    """Quantized while loading from either layout, by quantize, and by make-model: the same tokens and logprobs."""
    for shape in ("tiny-dense", "tiny-moe"):
        bf16 = {layout: made_model(shape, layout) for layout in ("paddle", "pt")}
        for q, name in FORMATS.items():
            done = new_folder()
            code, out, err, _ = run(["quantize", bf16["paddle"], done, "--quantization", q])
            assert code == 0 and name in out, (code, out, err)
            made = made_model(shape, "paddle", quantization=q)
            same = filecmp.dircmp(done, made)
            _, mismatch, errors = filecmp.cmpfiles(done, made, same.common_files, shallow=False)
            assert not same.left_only and not same.right_only and not mismatch and not errors, (same.report(), mismatch)
            seen = []
            for args in ([bf16["paddle"], "--quantization", q], [bf16["pt"], "--quantization", q], [done]):
                with Server(*args, "--backend", "ref") as s:
                    assert name in weights_line(s.stdout()), s.stdout()
                    assert ("quantized while loading" in s.stdout()) == ("--quantization" in args), s.stdout()
                    seen.append(reply(s))
                    assert s.stop() == 0
            assert seen[0] == seen[1] == seen[2], (shape, q, seen)


def exact_activations_differ():
    """--activation-quantization none computes with what auto rounds."""
    folder = made_model("tiny-dense", "pt", quantization="wint8")
    seen = []
    for how in ("auto", "none"):
        with Server(folder, "--backend", "ref", "--activation-quantization", how) as s:
            seen.append(reply(s)[1]["token_logprobs"])
            assert s.stop() == 0
    assert seen[0] != seen[1]


def a_checkpoints_own_format_wins():
    folder = made_model("tiny-moe", "pt", quantization="wint4")
    with Server(folder, "--backend", "ref", "--quantization", "block_wise_fp8") as s:
        assert FORMATS["wint4"] in weights_line(s.stdout())
        line = [line for line in s.stderr().split("\n") if "serve.quantization" in line]
        assert len(line) == 1 and "asked=\"block_wise_fp8" in line[0] and "found=\"wint4" in line[0], s.stderr()
        assert s.stop() == 0
    with Server(folder, "--backend", "ref", "--quantization", "wint4") as s:  # what it is already: nothing to say
        assert "serve.quantization" not in s.stderr()
        assert s.stop() == 0


def plans_count_quantized_bytes():
    """--dry-run shows the same sizes whether the weights are quantized already or would be."""
    bf16, done = made_model("0.3b", "paddle", layers=1), new_folder()
    assert run(["quantize", bf16, done, "--quantization", "wint8"])[0] == 0
    lines = [weights_line(run(["serve", *args, "--dry-run", "--backend", "ref"])[1])
             for args in ([bf16], [bf16, "--quantization", "wint8"], [done])]
    size = [re.match(r"weights +([0-9.]+ MiB)", line).group(1) for line in lines]
    assert size[1] == size[2] != size[0], lines
    assert "bf16" in lines[0] and "while loading" in lines[1] and "while loading" not in lines[2], lines


def refuses():
    bf16, done = made_model("tiny-dense"), made_model("tiny-dense", quantization="wint8")
    bad = [(["quantize"], "two folders"), (["quantize", bf16], "two folders"),
           (["quantize", bf16, "a", "b"], "'b' stands alone"),
           (["quantize", bf16, new_folder()], "nothing is to be quantized"),
           (["quantize", bf16, new_folder(), "--quantization", "none"], "nothing is to be quantized"),
           (["quantize", bf16, new_folder(), "--quantization", "int8"], "--quantization int8"),
           (["quantize", bf16, bf16, "--quantization", "wint8", "--force"], "name another folder"),
           (["quantize", bf16, done, "--quantization", "wint8"], "--force"),
           (["quantize", done, new_folder(), "--quantization", "wint8"], "quantized already"),
           (["quantize", "/nonexistent", new_folder(), "--quantization", "wint8"], "/nonexistent"),
           (["make-model", "--out", new_folder(), "--quantization", "w8a8"], "--quantization w8a8")]
    for args, word in bad:
        code, out, err, _ = run(args)
        assert code == 2 and word in err and out == "" and err.count("\n") == 1, (args, code, out, err)


def stops_and_leaves_nothing():
    """Ctrl-C in the middle. A run that ends before the signal comes is tried again."""
    bf16, done = made_model("0.3b", "paddle", layers=2), new_folder()
    part = os.path.join(done, "making.part", "model.safetensors")
    for _ in range(20):
        process = subprocess.Popen([BIN, "quantize", bf16, done, "--quantization", "wint4"], env=clean_env(),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60 * SLOW
        while not os.path.exists(part) and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60 * SLOW)
        if process.returncode == 0:
            shutil.rmtree(done)
            continue
        assert process.returncode == 1 and "stopped" in err, (process.returncode, err)
        assert not os.path.exists(done), os.listdir(done)
        return
    raise AssertionError("20 runs ended before the signal")


def memory_is_bounded():
    """Neither reading nor making holds the model: the largest tensor (the embedding, 212 MB of 540) and buffers."""
    bf16, done, made = made_model("0.3b", "paddle", layers=12), new_folder(), new_folder()
    all_bytes = sum(os.path.getsize(os.path.join(bf16, name)) for name in os.listdir(bf16))
    for args, most in ((["quantize", bf16, done], 0.6), (["make-model", "--shape", "0.3b", "--layers", "12", "--out", made], 0.2)):
        process = subprocess.Popen([BIN, *args, "--quantization", "wint8"], env=clean_env(), stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peak = used.ru_maxrss * 1024
        print(f"        {args[0]}: {peak / 1e6:.0f} MB at most, of a model of {all_bytes / 1e6:.0f} MB")
        if not os.environ.get("ERNEST_SAN"):
            assert peak < most * all_bytes, (args, peak, all_bytes)
    for folder in (bf16, done, made):
        shutil.rmtree(folder)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main(three_ways_serve_the_same, exact_activations_differ, a_checkpoints_own_format_wins, plans_count_quantized_bytes,
         refuses, stops_and_leaves_nothing, memory_is_bounded)
