"""/metrics after some traffic: promtool reads it, FastDeploy's names are there, the numbers are those of the traffic."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli"))
import harness  # noqa: E402

NAMES = """num_requests_running num_requests_waiting gpu_cache_usage_perc batch_size max_batch_size available_batch_size
available_gpu_block_num free_gpu_block_num max_gpu_block_num available_gpu_resource first_token_latency infer_latency
max_cpu_block_num num_requests_enqueued num_requests_loading
hit_req_rate hit_token_rate gpu_hit_token_rate cpu_hit_token_rate cache_config_info generation_tokens_total prompt_tokens_total request_success_total
requests_number_total prefix_cache_token_num_total prefix_gpu_cache_token_num_total prefix_cpu_cache_token_num_total
prefix_ssd_cache_token_num_total request_preempted_total prefix_cache_block_total prefix_cache_evicted_block_total
kv_tier_blocks kv_tier_max_blocks kv_tier_moved_out_total kv_tier_moved_in_total kv_tier_evicted_total kv_tier_errors_total
kv_tier_off
time_to_first_token_seconds_bucket time_per_output_token_seconds_bucket request_inference_time_seconds_bucket
request_queue_time_seconds_bucket request_prefill_time_seconds_bucket request_decode_time_seconds_bucket
e2e_request_latency_seconds_bucket request_prompt_tokens_bucket request_generation_tokens_bucket
request_params_max_tokens_bucket""".split()


def get(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=120) as answer:
        return answer.read().decode()


def value(text, name):
    found = re.search(r"^%s(?:\{[^}]*\})? ([0-9.eE+-]+)$" % re.escape(name), text, re.M)
    assert found, name
    return float(found[1])


def main():
    with harness.Server("--model", harness.made_model(), "--max-model-len", "512") as server:
        root = server.url[:-3] if server.url.endswith("/v1") else server.url
        for n in (3, 7):
            get(root + "/v1/completions", {"prompt": [20, 21], "max_tokens": n, "ignore_eos": True})
        for _ in range(6000):  # the last END leaves a moment before its pages are counted free
            text = get(root + "/metrics")
            if value(text, "fastdeploy:num_requests_running") == 0:
                break
            time.sleep(0.01)
        for name in NAMES:
            assert "\nfastdeploy:" + name in "\n" + text, name
        assert value(text, "fastdeploy:generation_tokens_total") == 10
        assert value(text, "fastdeploy:prompt_tokens_total") == 4
        assert value(text, "fastdeploy:request_success_total") == 2
        assert value(text, "fastdeploy:requests_number_total") == 2
        assert value(text, "fastdeploy:time_to_first_token_seconds_count") == 2
        assert value(text, "fastdeploy:time_per_output_token_seconds_count") == 8
        assert value(text, "fastdeploy:num_requests_running") == 0
        assert value(text, "fastdeploy:available_gpu_block_num") == value(text, "fastdeploy:max_gpu_block_num")
        assert value(text, "fastdeploy:gpu_cache_usage_perc") == 0
        assert value(text, "fastdeploy:num_requests_enqueued") == 0
        config = re.search(r"^fastdeploy:cache_config_info\{([^}]*)\} 1$", text, re.M)[1]
        for label in ('block_size="64"', 'enable_prefix_caching="True"', 'kvcache_storage_backend="None"', 'cache_dtype="bfloat16"'):
            assert label in config, (label, config)
        assert 'http_requests_total{method="POST",path="/v1/completions",status_code="200"} 2' in text
        if shutil.which("promtool"):
            done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
            # Its one complaint is a matter of taste and FastDeploy's choice: names with a colon.
            rest = [line for line in (done.stdout + done.stderr).splitlines() if "should not contain ':'" not in line]
            assert done.returncode in (0, 3) and not rest, rest
        print("metrics are well")


if __name__ == "__main__":
    main()
