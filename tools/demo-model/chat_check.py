#!/usr/bin/env python3
"""The twenty prompts of models/prompts.json through a running server: chat_check.py [URL, default http://127.0.0.1:8000].
Prints each answer; exit code 1 when fewer than 18 are right."""
import json
import pathlib
import sys
import urllib.request

PROMPTS = pathlib.Path(__file__).resolve().parents[2] / "models" / "prompts.json"
LEAST = 18


def ask(url, prompt):
    body = {"messages": prompt["messages"], "max_tokens": prompt["max_tokens"], "temperature": 0}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def is_right(check, text):
    return text == check["equals"] if "equals" in check else all(part in text for part in check["contains"])


def main():
    url = (sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000").rstrip("/")
    prompts, right = json.loads(PROMPTS.read_text(encoding="utf-8")), 0
    for prompt in prompts:
        text = ask(url, prompt)
        good = is_right(prompt["check"], text)
        right += good
        print(f"{'right' if good else 'WRONG'}  {prompt['name']}: {text}")
    print(f"{right} of {len(prompts)} right")
    return right < LEAST


if __name__ == "__main__":
    sys.exit(main())
