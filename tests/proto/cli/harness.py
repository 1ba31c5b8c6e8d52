"""What the tests of the command line share: the program, a scratch folder, a made model, a running server."""
import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
BIN = os.path.abspath(os.environ.get("ERNEST_BIN") or os.path.join(ROOT, "build", "release", "ernest"))
SLOW = 8 if os.environ.get("ERNEST_SAN") else 1  # a sanitizer's factor on every time limit

scratch = tempfile.mkdtemp(prefix="ernest-cli-", dir="/tmp")
atexit.register(shutil.rmtree, scratch, ignore_errors=True)


def clean_env(extra=None):
    """The environment without anything ernest would read, plus extra. No GPU is seen, so that all machines say the same."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FD_", "CUDA_", "ENABLE_V1", "INFERENCE_MSG"))}
    keep["CUDA_VISIBLE_DEVICES"] = ""
    keep.update(extra or {})
    return keep


def run(args, env=None, stdin="", timeout=60, **more):
    """Run ernest to its end; returns (exit code, stdout, stderr, seconds)."""
    begin = time.monotonic()
    done = subprocess.run([BIN, *args], env=clean_env(env), input=stdin, capture_output=True, text=True, timeout=timeout,
                          errors="replace", **more)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - begin


def made_model(shape="tiny-dense", layout="paddle", **flags):
    """A folder with a made checkpoint of its own."""
    path = tempfile.mkdtemp(prefix=shape + "-", dir=scratch)
    words = [w for k, v in flags.items() for w in ("--" + k.replace("_", "-"), str(v))]
    code, _, err, _ = run(["make-model", "--shape", shape, "--layout", layout, "--out", path, "--force", *words])
    assert code == 0, err
    return path


class Server:
    """`ernest serve` on a free port, ready; use as a context manager."""

    def __init__(self, *args, env=None, program=None, wait=True):
        read_end, write_end = os.pipe()
        self.err_path = tempfile.mktemp(prefix="stderr-", dir=scratch)
        self.out_path = tempfile.mktemp(prefix="stdout-", dir=scratch)
        command = program or [BIN, "serve"]
        with open(self.err_path, "wb") as err, open(self.out_path, "wb") as out:
            self.process = subprocess.Popen([*command, "--port", "0", "--ready-fd", str(write_end), *args],
                                            env=clean_env(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                            pass_fds=[write_end])
        os.close(write_end)
        self.url = ""
        if wait:
            with os.fdopen(read_end) as ready:
                self.url = ready.readline().strip()
            if not self.url:
                self.process.wait()
                raise AssertionError("the server did not start:\n" + self.stderr())
        else:
            os.close(read_end)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stderr(self):
        with open(self.err_path, encoding="utf-8", errors="replace") as f:
            return f.read()

    def stdout(self):
        with open(self.out_path, encoding="utf-8", errors="replace") as f:
            return f.read()

    def get(self, path, timeout=10):
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return answer.status, answer.read().decode()

    def post(self, path, body, timeout=60, headers=None):
        request = urllib.request.Request(self.url + path, data=json.dumps(body).encode(),
                                         headers={"Content-Type": "application/json", **(headers or {})})
        return urllib.request.urlopen(request, timeout=timeout)

    def stop(self, which=signal.SIGTERM, timeout=60):
        """Signal and wait; the exit code."""
        self.process.send_signal(which)
        return self.process.wait(timeout=timeout)


def main(*tests):
    """Run test functions, print one line each, exit."""
    failed = 0
    for test in tests:
        try:
            test()
            print(f"ok      {test.__name__}", flush=True)
        except Exception as e:  # a failure of any kind is one failed test
            failed += 1
            print(f"FAILED  {test.__name__}: {type(e).__name__}: {e}", flush=True)
            if not isinstance(e, AssertionError):
                import traceback
                traceback.print_exc()
    print(f"{len(tests) - failed} of {len(tests)} tests passed")
    sys.exit(1 if failed else 0)
