"""A thousand bad requests, made from the field table as docs/api.md prints it, and hand-written ones.

Each must be answered by a 4xx error object that names the field (where there is one); after every batch the server must
answer a good request. That the page is the validator's own is checked first.
"""
import http.client
import json
import os
import re
import socket
import sys
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli"))
import harness  # noqa: E402

PATHS = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
         "/v1/completions": {"prompt": "Hi"},
         "/tokenize": {"prompt": "Hi"},
         "/detokenize": {"tokens": [20]}}


def table():
    """[(path or 'stream_options', field, type, value text)] from the printed page."""
    code, page, err, _ = harness.run(["docs", "api"])
    assert code == 0, err
    with open(os.path.join(harness.ROOT, "docs", "api.md"), encoding="utf-8") as f:
        assert f.read() == page, "docs/api.md is old: ernest docs api > docs/api.md"
    rows, where = [], None
    for line in page.split("\n"):
        if line.startswith("### "):
            where = line[4:].replace("POST ", "")
        m = re.match(r"\| `(\w+)` \| ([^|]*) \|", line)
        if m and where:
            rows.append((where, m[1], m[2].split(",")[0].strip(), m[2]))
    assert len(rows) > 100, len(rows)
    return rows


def wrong_values(kind, text):
    """JSON texts that a field of this type must refuse."""
    words = {"boolean": ["true"], "integer": ["1"], "number": ["0.5"], "text": ['"x"'],
             "text or list of texts": ['"x"', "[]"], "list of ids": ["[]"], "object": ["{}"], "list": ["[]"]}
    if kind == "not built yet":
        return ['"x"', "{}", "[1]", "1", "true"]
    if kind not in words:
        return []
    every = ["true", "1", "1.5", '"x"', "[]", "{}", '[{"a":1}]', '["a",{}]', "[[[]]]", "-0.1e1"]
    fine = {"boolean": {"true"}, "integer": {"1", "-0.1e1"}, "number": {"1", "1.5", "-0.1e1"}, "text": {'"x"'},
            "text or list of texts": {'"x"', "[]"}, "list of ids": {"[]"}, "object": {"{}"},
            "list": {"[]", '[{"a":1}]', '["a",{}]', "[[[]]]"}}[kind]
    bad = [v for v in every if v not in fine]
    if kind in ("integer", "number"):
        bad += ["1e999", "-1e999", "NaN", "Infinity", "1e308", '"5"', "[1]", "99999999999999999999999"]
        m = re.search(r"(from|above)? ?(-?[\d.]+) to (-?[\d.]+)", text)
        if m:
            low, high = float(m[2]), float(m[3])
            bad += [str(int(low) - 1), str(int(high) + 1), str(int(high) * 1000 + 7), str(int(low) * 1000 - 7)]
        elif re.search(r"from (-?\d+)", text):
            bad += [str(int(re.search(r"from (-?\d+)", text)[1]) - 1), "-9223372036854775808", "2147483648"]
    m = re.search(r"at most (\d+)", text)
    many = int(m[1]) if m else 0
    m = re.search(r"(\d+) bytes", text)
    size = int(m[1]) if m else 0
    if kind == "text":
        bad += [json.dumps("x" * (size + 1)), '"\\ud800"', '"\\udc00\\ud800"']
    if kind == "text or list of texts":
        bad += ['""', '["a",""]', "[1]", '["a",null]', json.dumps("x" * (size + 1)), json.dumps(["a"] * (many + 1))]
    if kind == "list of ids":
        bad += ["[-1]", "[1.5]", '["1"]', "[99999999]", "[null]", "[1,[2]]", "[true]"]
        if many < 10000:
            bad.append(json.dumps([1] * (many + 1)))
    if kind == "object":
        bad.append(json.dumps({"k%d" % i: 1 for i in range(many + 1)}))
    if kind == "list" and many < 10000:
        bad.append(json.dumps([1] * (many + 1)))
    return bad


def body_with(path, field, value):
    """The good body with one field set to JSON text; stream_options' fields go inside it."""
    parts = {k: json.dumps(v) for k, v in PATHS[path].items()}
    parts[field] = value
    if field == "stream_options":
        parts["stream"] = "true"
    return "{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in parts.items()) + "}"


def generated():
    for where, field, kind, text in table():
        for value in wrong_values(kind, text):
            # a number that JSON cannot say is a fault of the JSON, not of the field
            json_fault = value in ("1e999", "-1e999", "NaN", "Infinity", "99999999999999999999999") or "\\u" in value
            param = None if json_fault else field
            if where == "stream_options":
                yield "/v1/chat/completions", body_with("/v1/chat/completions", "stream",
                                                        'true,"stream_options":{"%s":%s}' % (field, value)), param
                continue
            yield where, body_with(where, field, value), param
            if where == "/v1/chat/completions" and field not in ("metadata", "messages"):
                yield where, body_with(where, "metadata", '{"%s":%s}' % (field, value)), param
            if where == "/v1/completions" and field not in ("suffix", "prompt", "metadata"):
                yield where, body_with(where, "suffix", '{"%s":%s}' % (field, value)), param


def written():
    chat, comp = "/v1/chat/completions", "/v1/completions"
    hi = '"messages":[{"role":"user","content":"x"}]'
    for path in PATHS:
        for text in ("", "{", "}", "null", "5", '"x"', "[]", "[{}]", "{}x", "{'a':1}", '{"a"}', '{"a":}', "{,}", "\x00",
                     "\ufeff{}", "[" * 70 + "]" * 70, '{"a":' * 65 + "1" + "}" * 65, "[" * 200000, "nul", "+1", "01",
                     '{"x":"\\x"}', '{"x":"\t"}'):
            yield path, text, None
        yield path, '{"prompt":"a","prompt":"b"}', None
        yield path, b'{"prompt":"\xff\xfe"}', None
        yield path, b'{"prompt":"\xc0\x80"}', None
        yield path, b'{"prompt":"\xed\xa0\x80"}', None
    for messages in ("[]", "[1]", "[null]", '["x"]', "[{}]", '[{"role":"user"}]', '[{"role":"king","content":"x"}]',
                     '[{"role":1,"content":"x"}]', '[{"role":"user","content":1}]', '[{"role":"user","content":{}}]',
                     '[{"role":"user","content":[1]}]', '[{"role":"user","content":[{"type":"text"}]}]',
                     '[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]',
                     '[{"role":"user","content":[{"type":"text","text":1}]}]', '[{"role":"user","content":null}]',
                     '[{"role":"assistant","tool_calls":1}]', '[{"role":"assistant","tool_calls":[{}]}]',
                     '[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{"}}]}]',
                     '[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":[]}}]}]'):
        yield chat, '{"messages":%s}' % messages, "messages"
    for prompt in ("[]", "{}", "1", "true", '[""]', "[[]]", "[-1]", "[1.5]", "[99999999]", '["a",1]', '[1,"a"]', "[[1],2]",
                   '[[1],["a"]]', "[null]", '""', json.dumps(["a"] * 129), json.dumps([20] * 5000)):
        yield comp, '{"prompt":%s}' % prompt, "prompt"
    for more, param in (('"tool_choice":"required"', "tool_choice"), ('"tool_choice":{"type":"function"}', "tool_choice"),
                        ('"tool_choice":"maybe"', "tool_choice"), ('"tool_choice":3', "tool_choice")):
        yield chat, '{%s,"tools":[{"type":"function","function":{"name":"f"}}],%s}' % (hi, more), param
    for tools in ("[1]", "[{}]", '[{"type":"x"}]', '[{"type":"function"}]', '[{"type":"function","function":{}}]',
                  '[{"type":"function","function":{"name":1}}]', '[{"type":"function","function":{"name":""}}]',
                  '[{"type":"function","function":{"name":"f"}}]'):
        yield chat, '{%s,"tools":%s}' % (hi, tools), "tools"
    for kwargs in ('{"a":1}', '{"enable_thinking":1}', '{"options":1}', '{"options":{"a":1,"b":2}}', '{"thinking_mode":1}'):
        yield chat, '{%s,"chat_template_kwargs":%s}' % (hi, kwargs), "chat_template_kwargs"
    for form in ("{}", '{"type":1}', '{"type":"xml"}', '{"type":"json_object"}', '{"type":"json_schema","json_schema":{}}',
                 '{"type":"structural_tag"}'):
        for path in (chat, comp):
            yield path, body_with(path, "response_format", form), "response_format"
    for bias in ('{"x":1}', '{"-1":1}', '{"01":1}', '{"1.0":1}', '{" 1":1}', '{"99999999":1}', '{"1":101}', '{"1":-101}',
                 '{"1":"1"}', '{"1":null}', '{"1":[]}', '{"9999999999999999999999":1}', '{"":1}'):
        for path in (chat, comp):
            yield path, body_with(path, "logit_bias", bias), "logit_bias"
            yield path, body_with(path, "logits_processors_args", '{"logit_bias":%s}' % bias), "logits_processors_args"
    yield chat, '{%s,"logits_processors_args":{"thinking_budget":5}}' % hi, "logits_processors_args"
    yield chat, '{%s,"top_logprobs":3}' % hi, "top_logprobs"
    yield chat, '{%s,"stream_options":{}}' % hi, "stream_options"
    yield chat, '{%s,"metadata":{"raw_request":true}}' % hi, "metadata"
    yield chat, '{%s,"continue_final_message":true}' % hi, "continue_final_message"
    yield chat, '{%s,"max_tokens":99999}' % hi, "max_tokens"
    yield chat, '{%s,"max_completion_tokens":99999}' % hi, "max_completion_tokens"
    yield chat, '{%s,"min_tokens":9,"max_tokens":8}' % hi, "min_tokens"
    yield comp, '{"prompt":"x","max_tokens":0}', "max_tokens"
    yield comp, '{"prompt":"x","best_of":3}', "best_of"
    yield comp, '{"prompt":"x","n":2,"best_of":3}', "best_of"
    yield comp, '{"prompt":["a","b","c"],"n":128}', "n"
    yield comp, '{"prompt":"x","suffix":"y"}', "suffix"
    yield comp, '{"prompt":"x","bad_words":["several words in one"]}', "bad_words"
    yield comp, '{"prompt":"x","allowed_token_ids":[]}', "allowed_token_ids"
    yield comp, '{"prompt_token_ids":[]}', "prompt_token_ids"


class Client:
    def __init__(self, url):
        self.host = urllib.parse.urlparse(url).netloc
        self.conn = http.client.HTTPConnection(self.host, timeout=60)

    def post(self, path, body):
        self.conn.request("POST", path, body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body,
                          {"Content-Type": "application/json"})
        answer = self.conn.getresponse()
        return answer.status, answer.read()


def raw_bytes(host, port, data):
    """Bytes on the wire; what came back within two seconds."""
    with socket.create_connection((host, port), timeout=2) as s:
        s.sendall(data)
        got = b""
        try:
            while True:
                piece = s.recv(65536)
                if not piece:
                    break
                got += piece
                if b"\r\n\r\n" in got and len(got) > 20:
                    break
        except (TimeoutError, ConnectionError, socket.timeout):
            pass
    return got


def odd_wire(client):
    """What is not HTTP at all: refused or closed, never served."""
    name, port = client.host.rsplit(":", 1)
    name = name.strip("[]")
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64, b"garbage\r\n\r\n", b"\r\n\r\n\r\n\x00",
                 b"GET\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                 b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 60000 + b"\r\n\r\n",
                 b"GET /" + b"a" * 60000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        got = raw_bytes(name, int(port), data)
        assert not got.startswith(b"HTTP/1.1 200") and not got.startswith(b"HTTP/1.1 500"), (data[:60], got[:80])


def main():
    model = harness.made_model()
    with harness.Server("--model", model, "--max-model-len", "1024") as server:
        client = Client(server.url)

        def good():
            for path, body in PATHS.items():
                status, text = client.post(path, json.dumps({**body, **({"max_tokens": 2} if "v1" in path else {})}))
                assert status == 200, (path, status, text[:300])

        good()
        n = 0
        for cases in (generated(), written()):
            for path, body, param in cases:
                status, text = client.post(path, body)
                shown = (path, body[:300], status, text[:300])
                assert 400 <= status < 500, shown
                error = json.loads(text)["error"]
                assert set(error) == {"message", "type", "param", "code"}, shown
                assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str), shown
                assert param is None or error["param"] == param, shown
                n += 1
                if n % 100 == 0:
                    good()
            good()
        odd_wire(client)
        client = Client(server.url)
        good()
        assert n >= 1000, n
        assert server.process.poll() is None
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/completions"):  # unknown fields: taken, said once
            assert client.post(path, json.dumps({**PATHS[path], "max_tokens": 1, "xyzzy.1": 3, "odd name": [1]}))[0] == 200
        client.conn.close()
        assert server.stop() == 0
        for name in ("xyzzy.1", "odd?name"):
            assert server.stderr().count(f"event=server.unknown_field name={name} effect=none") == 1, name
        print(f"{n} bad requests, each a clear refusal")


if __name__ == "__main__":
    main()
