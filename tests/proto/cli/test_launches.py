#!/usr/bin/env python3
"""Bad launches: each ends with exit code 2 or 3 in under a second, with one line on stderr that names what is wrong and
what mends it. And the launch lines of the two seed documents: what works is accepted, what is not built is refused by
a sentence that says so."""
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile

from harness import ROOT, SLOW, made_model, main, run, scratch

LIMIT_S = 1.0 * SLOW

MODEL = made_model()
MOE = made_model("tiny-moe", "pt")


def yaml(text):
    handle, path = tempfile.mkstemp(suffix=".yaml", dir=scratch)
    os.write(handle, text.encode())
    os.close(handle)
    return path


def broken(change, source=MODEL):
    """A copy of a model after change(folder)."""
    path = tempfile.mkdtemp(prefix="broken-", dir=scratch)
    shutil.copytree(source, path, dirs_exist_ok=True)
    change(path)
    return path


def edit_config(**fields):
    def change(path):
        name = os.path.join(path, "config.json")
        with open(name, encoding="utf-8") as f:
            config = json.load(f)
        for key, value in fields.items():
            if value is None:
                config.pop(key, None)
            else:
                config[key] = value
        with open(name, "w", encoding="utf-8") as f:
            json.dump(config, f)
    return change


def overwrite(name, data):
    def change(path):
        with open(os.path.join(path, name), "wb") as f:
            f.write(data)
    return change


def remove(*names):
    def change(path):
        for name in names:
            os.unlink(os.path.join(path, name))
    return change


def truncate(name, keep):
    def change(path):
        target = os.path.join(path, name)
        with open(target, "r+b") as f:
            f.truncate(keep if keep >= 0 else os.path.getsize(target) + keep)
    return change


def edit_header(edit):
    """Change the JSON header of model.safetensors, the data staying where it is."""
    def change(path):
        name = os.path.join(path, "model.safetensors")
        with open(name, "rb") as f:
            data = f.read()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + size])
        edit(header)
        text = json.dumps(header).encode()
        with open(name, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + data[8 + size:])
    return change


def first_tensor(header):
    return sorted(k for k in header if k != "__metadata__")[0]


def drop_tensor(header):
    del header[first_tensor(header)]


def overlap(header):
    names = sorted(k for k in header if k != "__metadata__")
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def wrong_shape(header):
    header[first_tensor(header)]["shape"] = [1, 2, 3]


def wrong_type(header):
    header[first_tensor(header)]["dtype"] = "Q17"


taken = socket.socket()
taken.bind(("127.0.0.1", 0))
taken.listen(1)
TAKEN = str(taken.getsockname()[1])

def without_mark(name):
    """A copy of the model's tokenizer in which a token has another name of the same length."""
    def change(path):
        target = os.path.join(path, "tokenizer.model")
        with open(target, "rb") as f:
            data = f.read()
        assert data.count(name.encode()) == 1
        with open(target, "wb") as f:
            f.write(data.replace(name.encode(), name.replace("s", "x").encode()))
        for other in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
            if os.path.exists(os.path.join(path, other)):
                os.unlink(os.path.join(path, other))
    return broken(change)


def add_mtp_config(**fields):
    def change(path):
        with open(os.path.join(path, "mtp", "config.json"), "w", encoding="utf-8") as f:
            json.dump(fields, f)
    return change


MTP = made_model("tiny-moe", "paddle")
DEMO = os.path.join(ROOT, "models", "demo-dense")
M = ["--model", MODEL]
STORE = ["--kvcache-storage-backend", "file"]
SPEC = '{"method": "mtp", "num_speculative_tokens": 1, "model": "x"}'

# words of the line, words the sentence must hold[, environment]
BAD = [
    # ---- no model, wrong model
    ([], ["--model"]),
    (["--model"], ["--model", "value"]),
    (["--model", "/nonexistent"], ["--model", "/nonexistent"]),
    (["--model", "baidu/ERNIE-4.5-0.3B-Paddle"], ["baidu/ERNIE-4.5-0.3B-Paddle", "FD_MODEL_CACHE"]),
    (["--model", "baidu/ERNIE-4.5-0.3B-Paddle"], ["/tmp", "FD_MODEL_CACHE"], {"FD_MODEL_CACHE": "/tmp"}),
    (["--model", MODEL + "/config.json"], ["file", "folder"]),
    (["--model", scratch], ["config.json"]),
    ([MODEL, MOE], ["stands alone"]),
    ([MODEL, "--model", MOE], ["two models"]),
    ([*M, "--tokenizer", "/nonexistent"], ["/nonexistent"]),
    ([*M, "--model-config-name", "other.json"], ["other.json"]),
    ([*M, "--model-config-name", "../config.json"], ["--model-config-name"]),
    ([*M, "--chat-format", "llama"], ["--chat-format", "llama", "ernie"]),
    ([*M, "--chat-template", "x.jinja"], ["--chat-template", "not built"]),
    ([*M, "--load-choices", "dummy"], ["--load-choices", "make-model"]),
    ([*M, "--load-choices", "fast"], ["--load-choices", "fast"]),
    ([*M, "--reasoning-parser", "ernie-45-vl"], ["--reasoning-parser", "vision"]),
    ([*M, "--reasoning-parser", "qwen3"], ["--reasoning-parser", "qwen3"]),
    ([*M, "--tool-call-parser", "hermes"], ["--tool-call-parser", "hermes"]),
    # ---- flags that are none
    ([*M, "--prot", "80"], ["--prot", "--port"]),
    ([*M, "--max-seqs", "80"], ["--max-seqs", "--help"]),
    ([*M, "--max-model-length", "80"], ["--max-model-len"]),
    ([*M, "--gpu-memory-utilisation", "0.9"], ["--gpu-memory-utilization"]),
    ([*M, "--enable-prefix-cache"], ["--enable-prefix-caching"]),
    ([*M, "--trust-remote-code"], ["--trust-remote-code"]),
    ([*M, "-x"], ["-x"]),
    ([*M, "--no-model"], ["--no-model"]),
    ([*M, "--no-dry-run=1"], ["--no-dry-run"]),
    ([*M, "--dry-run=perhaps"], ["--dry-run", "perhaps"]),
    # ---- numbers
    ([*M, "--port", "eighty"], ["--port", "eighty"]),
    ([*M, "--port", "65536"], ["--port", "65536", "65535"]),
    ([*M, "--port", "-1"], ["--port", "-1"]),
    ([*M, "--port", "80.5"], ["--port", "80.5"]),
    ([*M, "--port="], ["--port"]),
    ([*M, "--port"], ["--port", "value"]),
    ([*M, "--metrics-port", "0"], ["--metrics-port"]),
    ([*M, "--max-model-len", "15"], ["--max-model-len", "15", "16"]),
    ([*M, "--max-model-len", "131073"], ["--max-model-len", "131072"]),
    (["--model", broken(edit_config(max_position_embeddings=1024)), "--max-model-len", "2048"], ["--max-model-len", "1024"]),
    ([*M, "--max-model-len", "1e3"], ["--max-model-len", "1e3"]),
    ([*M, "--max-model-len", "0x100"], ["--max-model-len"]),
    ([*M, "--max-num-seqs", "0"], ["--max-num-seqs", "256"]),
    ([*M, "--max-num-seqs", "257"], ["--max-num-seqs", "256"]),
    ([*M, "--max-num-batched-tokens", "0"], ["--max-num-batched-tokens"]),
    ([*M, "--max-num-seqs", "128", "--max-num-batched-tokens", "127"], ["--max-num-batched-tokens", "--max-num-seqs"]),
    ([*M, "--max-num-batched-tokens", "63"], ["--max-num-batched-tokens", "64"]),
    ([*M, "--max-num-batched-tokens", "100000"], ["--max-num-batched-tokens", "--max-model-len"]),
    ([*M, "--no-enable-chunked-prefill", "--max-num-batched-tokens", "512"], ["--max-num-batched-tokens", "chunked"]),
    ([*M, "--max-num-batched-tokens", "512"], ["--max-num-batched-tokens", "chunked"], {"FD_DISABLE_CHUNKED_PREFILL": "1"}),
    ([*M, "--max-num-partial-prefills", "1", "--max-long-partial-prefills", "2"],
     ["--max-long-partial-prefills is 2", "--max-num-partial-prefills"]),
    ([*M, "--max-num-partial-prefills", "2", "--no-enable-chunked-prefill"], ["--max-num-partial-prefills", "chunked"]),
    ([*M, "--long-prefill-token-threshold", "4000"], ["--long-prefill-token-threshold", "--max-model-len"]),
    ([*M, "--num-gpu-blocks-override", "0"], ["--num-gpu-blocks-override"]),
    ([*M, "--num-gpu-blocks-override", "33"], ["--num-gpu-blocks-override", "34"]),
    ([*M, "--memory", "0.01", "--max-model-len", "131072"], ["--max-model-len", "fit in memory"]),
    ([*M, "--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "1.5"]),
    ([*M, "--gpu-memory-utilization", "nan"], ["--gpu-memory-utilization", "nan"]),
    ([*M, "--kv-cache-ratio", "-0.1"], ["--kv-cache-ratio"]),
    ([*M, "--kv-cache-ratio", "0.1", "--num-gpu-blocks-override", "100"],
     ["--kv-cache-ratio 0.1 of 100", "leaves 10", "takes 34"], {"ENABLE_V1_KVCACHE_SCHEDULER": "0"}),
    ([*M, "--swap-space", "-1"], ["--swap-space", "-1"]),
    ([*M, "--swap-space", "60000"], ["--swap-space is 60000 GiB", "this machine has"]),
    ([*M, "--memory", "0.2", "--swap-space", "0.3"], ["fit in memory", "raise --memory", "--swap-space, which takes 0.30 GiB"]),
    ([*M, "--itl-target-ms", "-1"], ["--itl-target-ms", "-1"]),
    ([*M, "--itl-target-ms", "10", "--no-enable-chunked-prefill"], ["--itl-target-ms is 10", "--enable-chunked-prefill"]),
    ([*M, "--max-queue-wait-s", "soon"], ["--max-queue-wait-s", "soon"]),
    ([*M, "--max-queue-prompt-tokens", "-1"], ["--max-queue-prompt-tokens"]),
    ([*M, "--max-queue-mib", "-1"], ["--max-queue-mib"]),
    ([*M, "--memory", "60000"], ["--memory", "GiB"]),
    ([*M, "--memory", "lots"], ["--memory", "lots"]),
    ([*M, "--threads", "500"], ["--threads", "500"]),
    ([*M, "--max-concurrency", "0"], ["--max-concurrency"]),
    ([*M, "--max-body-mib", "0"], ["--max-body-mib"]),
    ([*M, "--max-logprobs", "21"], ["--max-logprobs", "20"]),
    ([*M, "--max-logprobs", "-1"], ["--max-logprobs"]),
    ([*M, "--seed", "-5"], ["--seed"]),
    ([*M, "--seed", "99999999999999999999"], ["--seed"]),
    ([*M, "--timeout-graceful-shutdown", "-1"], ["--timeout-graceful-shutdown"]),
    ([*M, "--scheduler-max-size", "-2"], ["--scheduler-max-size"]),
    ([*M, "--block-size", "128"], ["--block-size", "128"]),
    # ---- words
    ([*M, "--host", "no..such.host"], ["--host", "no..such.host"]),
    ([*M, "--host", "999.1.1.1"], ["--host", "999.1.1.1"]),
    ([*M, "--host", "192.0.2.77"], ["192.0.2.77"]),
    ([*M, "--port", TAKEN], [TAKEN, "--port"]),
    ([*M, "--port", "0", "--metrics-port", TAKEN], [TAKEN]),
    ([*M, "--backend", "gpu"], ["--backend", "gpu"]),
    ([*M, "--backend", "cuda"], ["ernest: --backend cuda: ", "; give --backend cpu"]),
    ([*M, "--graph-optimization-config", '{"use_cudagraph": 1}'], ["--graph-optimization-config", "use_cudagraph", "true or false"]),
    ([*M, "--cpu-level", "sse9"], ["--cpu-level", "sse9"]),
    ([*M, "--log-level", "loud"], ["--log-level", "loud"]),
    ([*M, "--api-key", ""], ["--api-key", "empty"]),
    (M, ["FD_API_KEY", ",,"], {"FD_API_KEY": ",,"}),
    ([*M, "--no-dry-run", "false"], ["--no-dry-run", "leave out 'false'"]),
    ([*M, "--dry-run", "true", "true"], ["'true' stands alone"]),
    ([*M, "--api-key", "two words"], ["--api-key", "blank"]),
    ([*M, "--cors-origin", "app.example"], ["--cors-origin", "app.example"]),
    ([*M, "--cors-origin", "https://app.example/x"], ["--cors-origin"]),
    ([*M, "--ready-fd", "77"], ["--ready-fd", "77"]),
    ([*M, "--ready-fd", "1"], ["--ready-fd"]),
    ([*M, "--graph-optimization-config", "{"], ["--graph-optimization-config", "JSON"]),
    ([*M, "--graph-optimization-config", "[]"], ["--graph-optimization-config", "object"]),
    ([*M, "--cache-queue-port", "x"], ["--cache-queue-port"]),
    ([*M, "--engine-worker-queue-port", "1,99999"], ["--engine-worker-queue-port"]),
    # ---- known and not built
    ([*M, "--quantization", "w4a8"], ["--quantization w4a8", "wint8", "wint4", "block_wise_fp8", "mix_quant"]),
    ([*M, "--quantization", "int3"], ["--quantization int3", "unknown", "mix_quant"]),
    ([*M, "--quantization", "{"], ["--quantization"]),
    ([*M, "--quantization", '{"quantization":"mix_quant"}'], ["--quantization", "dense_quant_type"]),
    ([*M, "--quantization", '{"quantization":"mix_quant","dense_quant_type":"wint2"}'], ["dense_quant_type", "wint2"]),
    ([*M, "--lm-head-quantization", "wint4"], ["--lm-head-quantization", "wint8"]),
    ([*M, "--activation-quantization", "int8"], ["--activation-quantization", "auto"]),
    ([*M, "--speculative-config", SPEC], ["--speculative-config", "not built"]),
    ([*M, "--speculative-config", "mtp"], ["--speculative-config", "JSON"]),
    ([*M, "--tensor-parallel-size", "2"], ["--tensor-parallel-size", "not built"]),
    ([*M, "-tp", "4"], ["--tensor-parallel-size", "not built"]),
    ([*M, "--tensor-parallel-size", "9"], ["--tensor-parallel-size", "8"]),
    ([*M, "--data-parallel-size", "2"], ["--data-parallel-size", "not built"]),
    ([*M, "--splitwise-role", "prefill"], ["--splitwise-role prefill", "not built"]),
    ([*M, "--splitwise-role", "both"], ["--splitwise-role", "both"]),
    ([*M, "--innode-prefill-ports", "7013"], ["--innode-prefill-ports", "not built"]),
    ([*M, "--splitwise-role", "mixed", "--innode-prefill-ports", "7013"], ["belongs to a decode server", "leave the flag out"]),
    ([*M, "--kvcache-storage-backend", "mooncake"], ["--kvcache-storage-backend mooncake", "not built", "give file"]),
    ([*M, "--kvcache-storage-backend", "attention_store"], ["--kvcache-storage-backend attention_store", "not built"]),
    ([*M, "--kvcache-storage-backend", "disk"], ["--kvcache-storage-backend", "disk", "file"]),
    ([*M, *STORE], ["--kvcache-storage-backend file needs a folder", "--kvcache-storage-dir"]),
    ([*M, *STORE, "--kvcache-storage-dir", scratch], ["--kvcache-storage-backend file needs a limit", "--kvcache-storage-gb"]),
    ([*M, *STORE, "--kvcache-storage-dir", "/dev/null", "--kvcache-storage-gb", "1"], ["--kvcache-storage-dir /dev/null", "folder"]),
    ([*M, *STORE, "--kvcache-storage-dir", scratch, "--kvcache-storage-gb", "0"], ["--kvcache-storage-gb"]),
    ([*M, *STORE, "--kvcache-storage-dir", scratch, "--kvcache-storage-gb", "1", "--no-enable-prefix-caching"],
     ["--kvcache-storage-backend file", "--no-enable-prefix-caching"]),
    ([*M, "--kvcache-storage-dir", scratch], ["--kvcache-storage-dir belongs to --kvcache-storage-backend file"]),
    ([*M, "--kvcache-storage-gb", "1"], ["--kvcache-storage-gb belongs to --kvcache-storage-backend file"]),
    ([*M, "--write-policy", "write_back"], ["--write-policy write_back", "as they are filled"]),
    ([*M, "--enable-prefix-caching=perhaps"], ["--enable-prefix-caching", "perhaps"]),
    ([*M, "--router", "127.0.0.1:9000"], ["--router", "not built"]),
    ([*M, "--scheduler-name", "global"], ["--scheduler-name", "local"]),
    ([*M, "--guided-decoding-backend", "xgrammar"], ["--guided-decoding-backend", "not built"]),
    ([*M, "--enable-early-stop"], ["--enable-early-stop", "not built"]),
    ([*M, "--logits-processors", "a.b:C"], ["--logits-processors", "not built"]),
    ([*M, "--logprobs-mode", "cooked"], ["--logprobs-mode", "cooked", "processed_logits"]),
    ([*M, "--ips", "10.0.0.1,10.0.0.2"], ["--ips", "several hosts"]),
    ([*M, "--enable-expert-parallel"], ["--enable-expert-parallel", "does not do"]),
    # ---- the environment
    (M, ["FD_SAMPLING_CLASS", "beam"], {"FD_SAMPLING_CLASS": "beam"}),
    (M, ["ENABLE_V1_KVCACHE_SCHEDULER", "'2'"], {"ENABLE_V1_KVCACHE_SCHEDULER": "2"}),
    (M, ["FD_DISABLED_RECOVER"], {"FD_DISABLED_RECOVER": "1"}),
    (M, ["FD_DISABLE_CHUNKED_PREFILL", "maybe"], {"FD_DISABLE_CHUNKED_PREFILL": "maybe"}),
    (M, ["FD_LOG_LEVEL", "loud"], {"FD_LOG_LEVEL": "loud"}),
    (M, ["FD_LOG_DIR", "/proc/nowhere"], {"FD_LOG_DIR": "/proc/nowhere"}),
    (M, ["FD_MAX_STOP_SEQS_NUM"], {"FD_MAX_STOP_SEQS_NUM": "many"}),
    # ---- the file
    ([*M, "--config", "/nonexistent.yaml"], ["--config", "/nonexistent.yaml"]),
    ([*M, "--config", scratch], ["--config"]),
    ([*M, "--config", yaml("prot: 80\n")], ["line 1", "prot", "port"]),
    ([*M, "--config", yaml("seed: 1\n- b\n")], ["YAML"]),
    ([*M, "--config", yaml("port: 99999\n")], ["--port", "line 1", "65535"]),
    ([*M, "--config", yaml("port: 1\nport: 2\n")], ["line 2", "twice"]),
    ([*M, "--config", yaml("seed: &a 1\nport: *a\n")], ["alias"]),
    ([*M, "--config", yaml("quantization: w4a8\n")], ["--quantization w4a8", "wint4"]),
    ([*M, "--config", yaml("quantization: {quantization: mix_quant}\n")], ["--quantization", "dense_quant_type"]),
    ([*M, "--config", yaml("config: x.yaml\n")], ["another"]),
    # ---- the checkpoint
    (["--model", broken(remove("config.json"))], ["config.json"]),
    (["--model", broken(overwrite("config.json", b"{"))], ["config.json"]),
    (["--model", broken(overwrite("config.json", b"[]"))], ["config.json"]),
    (["--model", broken(overwrite("config.json", b"\xff\xfe{}"))], ["config.json"]),
    (["--model", broken(edit_config(hidden_size=None))], ["config.json", "hidden_size"]),
    (["--model", broken(edit_config(hidden_size="big"))], ["config.json", "hidden_size"]),
    (["--model", broken(edit_config(num_hidden_layers=-1))], ["config.json", "num_hidden_layers"]),
    (["--model", broken(edit_config(num_hidden_layers=100000))], ["config.json", "num_hidden_layers"]),
    (["--model", broken(edit_config(num_key_value_heads=7))], ["config.json", "num_key_value_heads"]),
    (["--model", broken(edit_config(rms_norm_eps=0))], ["config.json", "rms_norm_eps"]),
    (["--model", broken(edit_config(num_hidden_layers=1))], ["model.safetensors"]),
    (["--model", broken(remove("model.safetensors"))], ["model.safetensors"]),
    (["--model", broken(truncate("model.safetensors", 0))], ["model.safetensors"]),
    (["--model", broken(truncate("model.safetensors", 7))], ["model.safetensors"]),
    (["--model", broken(truncate("model.safetensors", 100))], ["model.safetensors"]),
    (["--model", broken(truncate("model.safetensors", -1))], ["model.safetensors"]),
    (["--model", broken(overwrite("model.safetensors", b"\xff" * 64))], ["model.safetensors"]),
    (["--model", broken(edit_header(drop_tensor))], ["model.safetensors"]),
    (["--model", broken(edit_header(overlap))], ["model.safetensors"]),
    (["--model", broken(edit_header(wrong_shape))], ["model.safetensors"]),
    (["--model", broken(edit_header(wrong_type))], ["model.safetensors"]),
    (["--model", broken(remove("tokenizer.model"))], ["tokenizer"]),
    (["--model", broken(truncate("tokenizer.model", 1000))], ["tokenizer.model"]),
    (["--model", broken(edit_config(vocab_size=300))], ["tokenizer", "ids", "vocab_size", "config.json is 300"]),
    ([*M, "--tokenizer", DEMO], ["models/demo-dense has 4090 ids", MODEL + "/config.json is 1024"]),
    ([*M, "--tokenizer", without_mark("<|im_start|>"), "--chat-format", "ernie-thinking"],
     ["<|im_start|>", "ernie-thinking", "--chat-format"]),
    ([*M, "--tokenizer", without_mark("<|end_of_sentence|>")], ["<|end_of_sentence|>", "chat format ernie", "--tokenizer"]),
    (["--model", broken(edit_config(use_qk_norm=True))], ["config.json", "use_qk_norm is true"]),
    (["--model", broken(edit_config(rope_scaling={"type": "linear", "factor": 2}))],
     ["config.json", 'rope_scaling.type is "linear"; only "default"']),
    (["--model", broken(add_mtp_config(hidden_size=1), MTP)], ["mtp/config.json", "hidden_size is 1"]),
    (["--model", broken(overwrite("tokenizer.model", b"no protobuf"))], ["tokenizer.model"]),
]


def check(args, words, env=None):
    """None, or what is wrong with how this launch ended."""
    if "--port" not in " ".join(args):
        args = [*args, "--port", "0"]
    best = None
    for _ in range(3):  # a busy machine may delay one run, hardly three
        try:
            code, _, err, seconds = run(["serve", *args], env, timeout=10 * SLOW)
        except subprocess.TimeoutExpired:
            return "was not refused: it ran on"
        best = min(best, seconds) if best is not None else seconds
        if best < LIMIT_S:
            break
    lines = [line for line in err.split("\n") if line.startswith("ernest: ")]
    if code not in (2, 3):
        return f"exit code {code}: {err.strip()[-300:]}"
    if len(lines) != 1 or not err.rstrip().endswith(lines[0]):
        return f"{len(lines)} lines that say why: {err.strip()[-300:]}"
    missing = [w for w in words if w not in lines[0]]
    if missing:
        return f"'{lines[0]}' does not say {missing}"
    if best >= LIMIT_S:
        return f"took {best:.2f} s"
    return None


def bad_launches():
    assert len(BAD) >= 100, len(BAD)
    failed = []
    for args, words, *env in BAD:
        why = check(args, words, *env)
        if why:
            failed.append(f"\n  {' '.join(args)} {env[0] if env else ''}: {why}")
    print(f"        {len(BAD) - len(failed)} of {len(BAD)} bad launches are refused as they should be")
    assert not failed, f"{len(failed)} launches" + "".join(failed)


def memory_gib():
    with open("/proc/meminfo", encoding="utf-8") as f:
        return int(f.readline().split()[1]) / 2**20


# A document's machine has hundreds of GiB; one that cannot hold the host tier says so.
SWAP_50 = None if memory_gib() > 100 else "--swap-space"

# The launch lines of the seed documents with a model that is here. `None`: served; else what the refusal must say.
BASE_03B = ["--tensor-parallel-size", "1", "--max-model-len", "2048", "--kv-cache-ratio", "0.75", "--max-num-seqs", "128"]
BASE_21B = ["--tensor-parallel-size", "1", "--max-model-len", "2048", "--max-num-seqs", "128"]
PD = ["--max-model-len", "2048", "--max-num-seqs", "20", "--port", "7012", "--engine-worker-queue-port", "7013",
      "--metrics-port", "7014", "--cache-queue-port", "7015"]
SEEDS = [
    ([*M, *BASE_03B], {}, None),
    ([*M, *BASE_03B, "--quantization", "wint4"], {}, None),
    ([*M, *BASE_03B, "--quantization", "wint8"], {}, None),
    (["--model", MOE, *BASE_21B, "--quantization", "wint4"], {}, None),
    ([*M, *BASE_03B], {"ENABLE_V1_KVCACHE_SCHEDULER": "1"}, None),
    ([*M, *BASE_03B, "--enable-prefix-caching", "--swap-space", "50"], {}, SWAP_50),
    ([*M, *BASE_03B, "--enable-prefix-caching", "--swap-space", "0.25"], {}, None),
    ([*M, *BASE_03B, "--no-enable-prefix-caching", "--no-enable-output-caching"], {}, None),
    ([*M, *BASE_03B], {"ENABLE_V1_KVCACHE_SCHEDULER": "0"}, None),
    ([*M, *BASE_03B, "--enable-chunked-prefill", "--max-num-partial-prefills", "3", "--max-long-partial-prefills", "1",
      "--long-prefill-token-threshold", "512"], {}, None),
    ([*M, *BASE_03B, *STORE, "--write-policy", "write_through", "--kvcache-storage-gb", "0.1"],
     {"FILE_BACKEND_STORAGE_DIR": scratch + "/store"}, None),
    ([*M, *BASE_03B], {"FILE_BACKEND_STORAGE_DIR": scratch + "/store"}, None),
    ([*M, *BASE_03B, "--kvcache-storage-backend", "mooncake", "--write-policy", "write_through"], {}, "not built"),
    ([*M, *BASE_03B, "--enable-chunked-prefill"], {}, None),
    ([*M, *BASE_03B, "--use-cudagraph"], {}, None),
    ([*M, *BASE_03B], {"FD_SAMPLING_CLASS": "rejection"}, None),
    (["--model", MOE, *BASE_21B], {}, None),
    (["--model", MOE, *BASE_21B, "--speculative-config", SPEC], {"FD_DISABLE_CHUNKED_PREFILL": "1"},
     "--speculative-config"),
    (["--model", MOE, *PD, "--num-gpu-blocks-override", "400", "--gpu-memory-utilization", "0.9", "--kv-cache-ratio", "0.9"],
     {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "INFERENCE_MSG_QUEUE_ID": "1315", "FD_ATTENTION_BACKEND": "FLASH_ATTN"}, None),
    (["--model", MOE, *PD, "--tensor-parallel-size", "4"], {}, "--tensor-parallel-size 4"),
    (["--model", MOE, *PD, "--splitwise-role", "prefill"], {}, "--splitwise-role prefill"),
    (["--model", MOE, *PD, "--splitwise-role", "decode", "--innode-prefill-ports", "7013"], {}, "not built yet"),
    (["--model", MOE, *PD, "--quantization", "block_wise_fp8"], {}, None),
]


def seed_launch_lines():
    for args, env, refusal in SEEDS:
        code, out, err, _ = run(["serve", *args, "--check-config"], env)
        if refusal is None:
            assert code == 0 and "good" in out, f"{args} {env}: {err}"
        else:
            assert code == 2 and refusal in err, f"{args} {env}: exit {code}: {err}"


def checks_fail_where_a_start_fails():
    """--check-config and --dry-run never say good for a launch that is refused: they are asked about every bad one that is
    not about the port."""
    failed = []
    for args, words, *env in BAD:
        if TAKEN in args or "--dry-run" in " ".join(args):
            continue
        for check_flag in ("--check-config", "--dry-run"):
            code, out, err, _ = run(["serve", *args, check_flag], *env)
            if code not in (2, 3) or out or not all(w in err for w in words):
                failed.append(f"\n  {' '.join(args)} {check_flag}: exit {code} {out[-200:]} {err[-200:]}")
    assert not failed, f"{len(failed)} launches" + "".join(failed)


def switches_take_words():
    for words in (["--enable-prefix-caching", "false"], ["--no-enable-prefix-caching"], ["--enable-prefix-caching=false"],
                  ["--enable-prefix-caching"], ["--enable-prefix-caching", "True"], ["--no-enable-output-caching"],
                  ["--use-cudagraph", "True"], ["--host", "localhost"]):
        code, out, err, _ = run(["serve", *M, *words, "--check-config"])
        assert code == 0 and "good" in out, (words, err)


def nothing_is_written_before_ready():
    """A refused launch leaves nothing on stdout: scripts that read it see only a server that runs."""
    for args in ([], ["--port", "x"], ["--model", broken(truncate("model.safetensors", 100))]):
        code, out, _, _ = run(["serve", *args])
        assert code == 2 and out == "", (args, code, out)


if __name__ == "__main__":
    main(bad_launches, checks_fail_where_a_start_fails, switches_take_words, seed_launch_lines, nothing_is_written_before_ready)
