// What the client tests share: the program, scratch folders, made models, a running server, scripted replies.
import { spawn, execFileSync } from "node:child_process";
import fs from "node:fs";
import { createRequire } from "node:module";
import os from "node:os";
import path from "node:path";

export const BIN = process.env.ERNEST_BIN;
export const SLOW = process.env.ERNEST_SAN ? 8 : 1; // a sanitizer's factor on every time limit

// The libraries lie beside the build, not beside these files.
export const library = createRequire(path.join(process.env.ERNEST_CLIENTS ?? "/nowhere", "package.json"));

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), "ernest-clients-"));
const running = new Set();
process.on("exit", () => {
  for (const child of running) child.kill("SIGKILL");
  fs.rmSync(scratch, { recursive: true, force: true });
});

function cleanEnv() {
  const foreign = /^(FD_|CUDA_|ENABLE_V1|INFERENCE_MSG)/;
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !foreign.test(name)));
}

export function madeModel(shape) {
  const dir = path.join(scratch, shape);
  if (!fs.existsSync(dir))
    execFileSync(BIN, ["make-model", "--shape", shape, "--out", dir], { env: cleanEnv(), stdio: "ignore" });
  return dir;
}

// Words a model of random weights never says by itself, each one token, so that a reply can be written by the test:
// the dictionary has them from id 1004 on, where the made tokenizer ends and the embedding (1024 rows) does not.
export const WORDS = [
  "I should look that up. ",
  "Then I answer.\n",
  "\n</think>\n\n",
  "<tool_call>\n",
  '{"name": "get_weather", "arguments": ',
  '{"city": "北京", "days": 2}}',
  "\n</tool_call>\n",
  "<tool_call>\n{\"name\": \"get_time\", ",
  '"arguments": {}}',
  "\n</tool_call>",
  "<response>\n",
  "It is sunny. ",
  "你好 😀",
  "\n</response>\n",
  "{not JSON}",
  '<tool_call>\n{"name": "get_weather", "arguments": {"city": "x"}}\n</tool_call>',
];
const FIRST_WORD = 1004;
const END = 2; // </s>, which every format stops at

// A model that speaks the thinking format and knows WORDS.
export function thinkingModel() {
  const dir = path.join(scratch, "thinking");
  if (fs.existsSync(dir)) return dir;
  fs.cpSync(madeModel("tiny-dense"), dir, { recursive: true });
  const file = path.join(dir, "tokenizer_config.json");
  const config = JSON.parse(fs.readFileSync(file, "utf8"));
  config.added_tokens_decoder = Object.fromEntries(
    WORDS.map((content, i) => [String(FIRST_WORD + i), { content, special: false }]),
  );
  config.chat_template = "<|im_start|>";
  fs.writeFileSync(file, JSON.stringify(config));
  return dir;
}

// Request fields that make the reply these words and then its end: the arg-max walks down a ladder of biases, and the
// repetition penalty takes each step away once it was stepped on. Words (or token ids) must differ; at most six fit, as the steps
// must stand further apart than logits do (measured: under 8 on these models).
export function scripted(...words) {
  const ids = words.map((word) => {
    if (typeof word === "number") return word;
    if (!WORDS.includes(word)) throw new Error(`no such word: ${word}`);
    return FIRST_WORD + WORDS.indexOf(word);
  });
  if (words.length > 6) throw new Error("at most six words");
  const logit_bias = {};
  [...ids, END].forEach((id, k) => (logit_bias[id] = 100 - 12 * k));
  return { temperature: 0, repetition_penalty: 10, logit_bias };
}

export class Server {
  // An `ernest serve` on a free port, ready.
  static async start(model, ...flags) {
    const server = new Server();
    server.log = path.join(scratch, `log-${Math.random().toString(36).slice(2)}`);
    const log = fs.openSync(server.log, "w");
    server.child = spawn(BIN, ["serve", "--model", model, "--port", "0", "--ready-fd", "3", ...flags], {
      env: cleanEnv(),
      stdio: ["ignore", log, log, "pipe"],
    });
    fs.closeSync(log);
    running.add(server.child);
    server.ended = new Promise((done) =>
      server.child.on("exit", (code) => {
        running.delete(server.child);
        done(code);
      }),
    );
    let line = "";
    for await (const piece of server.child.stdio[3]) {
      line += piece;
      if (line.includes("\n")) break;
    }
    server.child.stdio[3].destroy();
    server.child.unref(); // a failed test leaves its server to the exit handler above
    server.url = line.trim();
    if (!server.url) throw new Error(`the server did not start:\n${fs.readFileSync(server.log, "utf8")}`);
    return server;
  }

  post(where, body, more = {}) {
    return fetch(this.url + where, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...more.headers },
      body: typeof body === "string" ? body : JSON.stringify(body),
      signal: more.signal,
    });
  }

  // A gauge or counter of /metrics.
  async metric(name) {
    const text = await (await fetch(`${this.url}/metrics`)).text();
    const row = text.split("\n").find((line) => line.startsWith(`fastdeploy:${name} `));
    if (!row) throw new Error(`no metric ${name}`);
    return Number(row.split(" ")[1]);
  }

  // Milliseconds until the metric has the value; throws after the limit.
  async untilMetric(name, value, limitMs = 10_000) {
    const begin = performance.now();
    while ((await this.metric(name)) !== value) {
      if (performance.now() - begin > limitMs * SLOW) throw new Error(`${name} is not ${value} after ${limitMs} ms`);
      await sleep(2);
    }
    return performance.now() - begin;
  }

  // Until no request holds a place any more.
  async untilFree(key = "none") {
    const headers = { Authorization: `Bearer ${key}` };
    while ((await (await fetch(`${this.url}/v1/load`, { headers })).json()).active_requests !== 0) await sleep(2);
  }

  // Milliseconds until nothing runs, and what is allowed: 100, and what a busy machine adds, seen in a plain answer.
  async freedWithin(bound = 100) {
    const ms = await this.untilMetric("num_requests_running", 0, 60_000);
    const begin = performance.now();
    await this.metric("num_requests_running");
    return { ms, allowed: bound * SLOW + 10 * (performance.now() - begin) };
  }

  async stop(signal = "SIGTERM") {
    this.child.ref();
    if (this.child.exitCode === null) this.child.kill(signal);
    return this.ended;
  }
}

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
