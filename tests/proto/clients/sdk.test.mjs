// openai-node (raw iteration and the .stream() helper) against a running server: what it returns, throws, retries and
// lets go of.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { gzipSync } from "node:zlib";
import { library, madeModel, scripted, Server, sleep, thinkingModel } from "./house.mjs";

const { OpenAI } = library("openai");
const user = (content) => [{ role: "user", content }];
const weather = {
  type: "function",
  function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } },
};
const CALL = ["<tool_call>\n", '{"name": "get_weather", "arguments": ', '{"city": "北京", "days": 2}}', "\n</tool_call>\n"];
const ENDLESS = { max_tokens: 30000, ignore_eos: true };

let dense, moe, thinking, narrow;
before(async () => {
  dense = await Server.start(madeModel("tiny-dense"), "--threads", "1", "--max-model-len", "32768");
  moe = await Server.start(madeModel("tiny-moe"), "--threads", "1");
  thinking = await Server.start(thinkingModel(), "--threads", "1");
  narrow = await Server.start(
    madeModel("tiny-dense"), "--threads", "1", "--max-model-len", "32768", "--max-concurrency", "1", "--api-key", "sesame",
    "--api-key", "open", "--served-model-name", "ernie", "--cors-origin", "https://app.example", "--max-body-mib", "1",
  );
});
after(() => Promise.all([dense, moe, thinking, narrow].map((s) => s.stop())));

const clientOf = (s, more = {}) => new OpenAI({ baseURL: `${s.url}/v1`, apiKey: "sesame", maxRetries: 0, ...more });

async function collect(stream) {
  const all = { text: "", reasoning: "", calls: [], finish: null, usage: null, chunks: 0 };
  for await (const chunk of stream) {
    all.chunks++;
    all.usage = chunk.usage ?? all.usage;
    const c = chunk.choices[0];
    if (!c) continue;
    all.text += c.delta?.content ?? c.text ?? "";
    all.reasoning += c.delta?.reasoning_content ?? "";
    for (const k of c.delta?.tool_calls ?? []) {
      const call = (all.calls[k.index] ??= { name: "", arguments: "" });
      call.name += k.function.name ?? "";
      call.arguments += k.function.arguments;
    }
    all.finish = c.finish_reason ?? all.finish;
  }
  return all;
}

// ---- answers -----------------------------------------------------------------------------------------------------

for (const model of ["dense", "moe"]) {
  test(`${model}: whole, raw stream and helper say the same, and a seed says it again`, async () => {
    const server = { dense, moe }[model];
    const client = clientOf(server);
    const ask = { model: "any", messages: user("Hello 你好"), max_tokens: 30, seed: 4, temperature: 1.3, ignore_eos: true };
    const whole = await client.chat.completions.create(ask);
    assert.equal(whole.usage.completion_tokens, 30);
    assert.equal(whole.choices[0].finish_reason, "length");
    const text = whole.choices[0].message.content;
    const raw = await collect(await client.chat.completions.create({ ...ask, stream: true }));
    assert.deepEqual([raw.text, raw.finish, raw.usage], [text, "length", null]);
    const options = { include_usage: true };
    const counted = await collect(await client.chat.completions.create({ ...ask, stream: true, stream_options: options }));
    assert.deepEqual(counted.usage, whole.usage);

    const helper = client.chat.completions.stream({ ...ask, stream_options: options });
    const seen = [];
    helper.on("content", (delta) => seen.push(delta));
    const final = await helper.finalChatCompletion();
    assert.equal(final.choices[0].message.content, text);
    assert.equal(seen.join(""), text);
    assert.equal((await helper.finalMessage()).role, "assistant");
    const total = await helper.totalUsage(); // the three sums; the helper drops the details
    assert.deepEqual([total.prompt_tokens, total.total_tokens], [whole.usage.prompt_tokens, whole.usage.total_tokens]);

    assert.equal((await client.chat.completions.create(ask)).choices[0].message.content, text);
    const other = await client.chat.completions.create({ ...ask, seed: 5 });
    assert.notEqual(other.choices[0].message.content, text);
  });
}

test("n choices differ, come back the same, and end in the helper too", async () => {
  const client = clientOf(dense);
  const ask = { model: "any", messages: user("Hello"), n: 4, seed: 9, temperature: 1.5, max_tokens: 12, ignore_eos: true };
  const whole = await client.chat.completions.create(ask);
  const texts = whole.choices.map((c) => c.message.content);
  assert.equal(new Set(texts).size, 4);
  const final = await client.chat.completions.stream(ask).finalChatCompletion();
  assert.deepEqual(final.choices.map((c) => c.message.content), texts);
  assert.equal(whole.usage.completion_tokens, 48);
});

test("continuous usage counts up to the whole", async () => {
  const counts = [];
  const stream = await clientOf(dense).chat.completions.create({
    model: "any", messages: user("Hello"), max_tokens: 8, ignore_eos: true, stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  });
  for await (const chunk of stream) counts.push(chunk.usage.completion_tokens);
  assert.equal(counts[counts.length - 1], 8);
  assert.deepEqual(counts, [...counts].sort((a, b) => a - b));
});

test("stop strings end the text in front of them", async () => {
  const client = clientOf(dense);
  const ask = { model: "any", messages: user("Hello"), max_tokens: 60, seed: 2, temperature: 1.5, ignore_eos: true };
  const free = (await client.chat.completions.create(ask)).choices[0].message.content;
  const stop = free.slice(10, 13);
  const cut = free.slice(0, free.indexOf(stop));
  for (const stream of [false, true]) {
    const answer = await client.chat.completions.create({ ...ask, stop: [stop, "never said"], stream });
    const got = stream ? await collect(answer) : { text: answer.choices[0].message.content, finish: answer.choices[0].finish_reason };
    assert.deepEqual([got.text, got.finish], [cut, "stop"]);
  }
});

test("logprobs: the bytes join to the text, the best is the arg-max", async () => {
  const ask = { model: "any", messages: user("Hello"), max_tokens: 20, temperature: 0, logprobs: true, top_logprobs: 3 };
  const answer = await clientOf(moe).chat.completions.create({ ...ask, ignore_eos: true });
  const { content } = answer.choices[0].logprobs;
  assert.equal(content.length, 20);
  const bytes = Buffer.from(content.flatMap((t) => t.bytes));
  assert.equal(bytes.toString("utf8"), answer.choices[0].message.content);
  for (const t of content) {
    assert.equal(t.top_logprobs.length, 3);
    assert.ok(t.logprob <= 0 && t.logprob === t.top_logprobs[0].logprob, JSON.stringify(t));
  }
});

test("completions: every prompt form, echo, scored prompts as evaluation harnesses ask for them", async () => {
  const client = clientOf(dense);
  const ask = { model: "any", max_tokens: 5, temperature: 0, ignore_eos: true };
  const ids = (await (await dense.post("/tokenize", { prompt: "Hello there" })).json()).tokens;
  const one = await client.completions.create({ ...ask, prompt: "Hello there" });
  const same = async (prompt, n) => {
    const answer = await client.completions.create({ ...ask, prompt });
    assert.deepEqual(answer.choices.map((c) => c.text), Array(n).fill(one.choices[0].text), JSON.stringify(prompt));
    assert.equal(answer.usage.prompt_tokens, n * ids.length);
  };
  await same(["Hello there"], 1);
  await same(ids, 1);
  await same([ids, ids, ids], 3);
  await same(["Hello there", "Hello there"], 2);
  const echo = await client.completions.create({ ...ask, prompt: "Hello there", echo: true, logprobs: 1, max_tokens: 1 });
  assert.ok(echo.choices[0].text.startsWith("Hello there"));
  const { token_logprobs, tokens, text_offset, top_logprobs } = echo.choices[0].logprobs;
  assert.equal(token_logprobs[0], null);
  assert.ok(token_logprobs.slice(1).every((v) => v <= 0));
  assert.equal(tokens.length, ids.length + 1);
  assert.ok(text_offset.length === tokens.length && top_logprobs.length === tokens.length);
  const streamed = await collect(await client.completions.create({ ...ask, prompt: ids, stream: true }));
  assert.equal(streamed.text, one.choices[0].text);
  const listed = (await client.models.list()).data;
  assert.equal(listed.length, 1);
  assert.equal((await clientOf(narrow).models.retrieve("ernie")).id, "ernie");
});

// ---- reasoning and tools -----------------------------------------------------------------------------------------

test("reasoning has its own field, in streams and whole", async () => {
  const client = clientOf(thinking);
  const words = ["I should look that up. ", "Then I answer.\n", "\n</think>\n\n", "<response>\n", "你好 😀", "\n</response>\n"];
  const ask = { model: "any", messages: user("Weather?"), ...scripted(...words) };
  const whole = (await client.chat.completions.create(ask)).choices[0].message;
  assert.deepEqual([whole.content, whole.reasoning_content], ["你好 😀", "I should look that up. Then I answer.\n"]);
  assert.equal(whole.reasoning, whole.reasoning_content);
  const raw = await collect(await client.chat.completions.create({ ...ask, stream: true }));
  assert.deepEqual([raw.text, raw.reasoning, raw.finish], [whole.content, whole.reasoning_content, "stop"]);
});

test("a tool call reaches the caller whole, by every path, and the loop with the tool's answer goes on", async () => {
  const client = clientOf(thinking);
  const messages = user("What is the weather in 北京?");
  const ask = { model: "any", messages, tools: [weather], ...scripted("I should look that up. ", "\n</think>\n\n", ...CALL) };
  const want = { name: "get_weather", arguments: '{"city": "北京", "days": 2}' };
  const whole = (await client.chat.completions.create(ask)).choices[0];
  assert.equal(whole.finish_reason, "tool_calls");
  assert.deepEqual(whole.message.tool_calls[0].function, want);
  const raw = await collect(await client.chat.completions.create({ ...ask, stream: true }));
  assert.deepEqual([raw.calls, raw.finish, raw.text], [[want], "tool_calls", ""]);
  const final = await client.chat.completions.stream(ask).finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, "tool_calls");
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, want.arguments);
  assert.equal(final.choices[0].message.tool_calls[0].type, "function");

  const tool_call_id = whole.message.tool_calls[0].id;
  const next = [...messages, whole.message, { role: "tool", tool_call_id, content: '{"sky": "clear"}' }];
  const done = await client.chat.completions.create({ ...ask, messages: next, ...scripted("\n</think>\n\n", "It is sunny. ") });
  assert.deepEqual([done.choices[0].message.content, done.choices[0].finish_reason], ["It is sunny. ", "stop"]);
});

// runTools sends no field that its types do not know, so the reply is written in by the fetch it is given.
test("the SDK's own tool loop runs the function and ends", async () => {
  const replies = [scripted("\n</think>\n\n", ...CALL), scripted("\n</think>\n\n", "It is sunny. ")];
  let turn = 0;
  const client = clientOf(thinking, {
    fetch: (url, init) => fetch(url, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), ...replies[turn++] }) }),
  });
  const asked = [];
  const tool = {
    type: "function",
    function: { ...weather.function, parse: JSON.parse, function: (args) => (asked.push(args), "clear") },
  };
  for (const stream of [false, true]) {
    turn = 0;
    const run = client.chat.completions.runTools({ model: "any", messages: user("Weather?"), tools: [tool], stream });
    assert.equal(await run.finalContent(), "It is sunny. ");
  }
  assert.deepEqual(asked, Array(2).fill({ city: "北京", days: 2 }));
});

// ---- leaving -----------------------------------------------------------------------------------------------------

test("abort, break and time-out free the place within 100 ms, streaming or not", async () => {
  const client = clientOf(dense);
  const pages = await dense.metric("available_gpu_block_num");
  const ask = { model: "any", messages: user("Hello"), ...ENDLESS };
  const running = () => dense.untilMetric("num_requests_running", 1, 60_000);
  const ways = {
    async break() {
      const broken = await client.chat.completions.create({ ...ask, stream: true });
      for await (const chunk of broken) if (chunk.choices[0].delta.content) break;
    },
    async "abort of a stream"() {
      const stop = new AbortController();
      const streamed = await client.chat.completions.create({ ...ask, stream: true }, { signal: stop.signal });
      const reading = collect(streamed).catch((e) => e);
      await running();
      stop.abort();
      await reading;
    },
    async "abort of a whole answer"() {
      const stop = new AbortController();
      const whole = client.chat.completions.create(ask, { signal: stop.signal });
      const aborted = assert.rejects(whole, OpenAI.APIUserAbortError);
      await running();
      stop.abort();
      await aborted;
    },
    async "abort of the helper"() {
      const helper = client.chat.completions.stream(ask);
      const helped = assert.rejects(helper.finalContent(), OpenAI.APIUserAbortError);
      await running();
      helper.abort();
      await helped;
    },
    async "time-out"() {
      await assert.rejects(client.chat.completions.create(ask, { timeout: 60 }), OpenAI.APIConnectionTimeoutError);
    },
  };
  for (const [name, leave] of Object.entries(ways)) {
    const tries = [];
    do {
      await leave();
      tries.push(await dense.freedWithin());
      await dense.untilMetric("available_gpu_block_num", pages, 60_000);
    } while (tries.every((t) => t.ms >= t.allowed) && tries.length < 3);
    assert.ok(tries.some((t) => t.ms < t.allowed), `${name}: free only after ${tries.map((t) => t.ms.toFixed(0))} ms`);
  }
});

test("many abort at once and every page comes back", async () => {
  const client = clientOf(dense);
  const pages = await dense.metric("available_gpu_block_num");
  const all = Array.from({ length: 24 }, (_, i) => {
    const stop = new AbortController();
    setTimeout(() => stop.abort(), 10 + 7 * i);
    const ask = { model: "any", messages: user(`Hello ${i}`), ...ENDLESS, stream: i % 2 === 0 };
    return client.chat.completions.create(ask, { signal: stop.signal }).then((s) => (ask.stream ? collect(s) : s)).catch((e) => e);
  });
  await Promise.all(all);
  await dense.untilMetric("num_requests_running", 0, 60_000);
  await dense.untilMetric("num_requests_waiting", 0, 60_000);
  await dense.untilMetric("available_gpu_block_num", pages, 60_000);
});

// ---- errors ------------------------------------------------------------------------------------------------------

test("errors keep class, message, param, code and request id", async () => {
  const client = clientOf(narrow);
  const ask = (more, options) => client.chat.completions.create({ model: "ernie", messages: user("x"), ...more }, options);
  const cases = [
    [() => ask({ temperature: 9 }), OpenAI.BadRequestError, 400, /temperature/, "temperature"],
    [() => ask({ max_tokens: 1e6 }), OpenAI.BadRequestError, 400, /32768/, "max_tokens"],
    [() => ask({ messages: [] }), OpenAI.BadRequestError, 400, /messages/, "messages"],
    [() => ask({ response_format: { type: "json_object" } }), OpenAI.BadRequestError, 400, /not built/, "response_format"],
    [() => clientOf(narrow, { apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError, 401, /API key/, null],
    [() => ask({ model: "gpt" }), OpenAI.NotFoundError, 404, /gpt/, "model"],
    [() => client.models.retrieve("gpt"), OpenAI.NotFoundError, 404, /gpt/, "model"],
    [() => client.get("/nothing"), OpenAI.NotFoundError, 404, /no such path/, null],
    [() => client.get("/chat/completions"), OpenAI.APIError, 405, /method/, null],
    [() => ask({ messages: user("x".repeat(2 << 20)) }), OpenAI.APIError, 413, /larger/, null],
    [() => ask({ stream: true, temperature: 9 }), OpenAI.BadRequestError, 400, /temperature/, "temperature"],
    [() => client.chat.completions.stream({ model: "gpt", messages: [] }).finalContent(), OpenAI.APIError, 404, /gpt/, "model"],
  ];
  for (const [call, kind, status, message, param] of cases) {
    await assert.rejects(call, (e) => {
      assert.ok(e instanceof kind, `${e}`);
      assert.equal(e.status, status, `${e}`);
      assert.match(e.message, message);
      assert.equal(e.param ?? null, param, `${e}`);
      assert.ok(e.requestID, "no request id");
      return true;
    });
  }
});

test("a request id that is sent comes back, also on errors; both keys open", async () => {
  const headers = { "X-Request-Id": "mine-1" };
  const client = clientOf(narrow, { apiKey: "open" });
  const ask = { model: "ernie", messages: user("x"), max_tokens: 1 };
  const { response } = await client.chat.completions.create(ask, { headers }).withResponse();
  assert.equal(response.headers.get("x-request-id"), "mine-1");
  await assert.rejects(client.chat.completions.create({ ...ask, n: 0 }, { headers }), { requestID: "mine-1" });
  assert.equal((await fetch(`${narrow.url}/health`)).status, 200);
  assert.equal((await fetch(`${narrow.url}/v1/models`)).status, 401);
  assert.equal((await narrow.post("/tokenize", { prompt: "x" })).status, 401);
});

test("a body is read as JSON whatever its type says; one that is not JSON is told so", async () => {
  const post = (body, headers) => fetch(`${dense.url}/v1/completions`, { method: "POST", headers, body });
  const body = JSON.stringify({ prompt: "x", max_tokens: 1 });
  for (const type of ["application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded"])
    assert.equal((await post(body, { "Content-Type": type })).status, 200, type);
  for (const other of ["prompt=x&max_tokens=1", gzipSync(body)]) {
    const refused = await post(other, { "Content-Type": "application/json", "Content-Encoding": "gzip" });
    assert.equal(refused.status, 415);
    assert.match((await refused.json()).error.message, /Content-Encoding/);
  }
  const refused = await post("prompt=x&max_tokens=1", { "Content-Type": "application/json" });
  assert.equal(refused.status, 400);
  assert.match((await refused.json()).error.message, /JSON/);
});

test("429 is a RateLimitError with its message; the SDK waits as told and then succeeds", async () => {
  const ask = { model: "ernie", messages: user("x"), max_tokens: 2 };
  const stop = new AbortController();
  const long = await clientOf(narrow).chat.completions.create({ ...ask, ...ENDLESS, stream: true }, { signal: stop.signal });
  const reading = collect(long).catch((e) => e);
  await narrow.untilMetric("num_requests_running", 1);
  let told;
  await assert.rejects(clientOf(narrow).chat.completions.create(ask), (e) => {
    told = Number(e.headers.get("retry-after-ms"));
    return e instanceof OpenAI.RateLimitError && /max concurrency is 1/.test(e.message) && e.headers.get("retry-after") === "1";
  });
  assert.ok(told >= 800 && told < 1200, `${told}`);

  const tries = [];
  const patient = clientOf(narrow, {
    maxRetries: 3,
    async fetch(...a) {
      tries.push(performance.now());
      const answer = await fetch(...a);
      if (tries.length > 1) return answer;
      stop.abort(); // once it was refused: the place is free before it comes again
      await reading;
      await narrow.untilFree("sesame");
      tries[0] = performance.now();
      return answer;
    },
  });
  assert.equal((await patient.chat.completions.create(ask)).usage.completion_tokens, 2);
  assert.equal(tries.length, 2);
  const waited = tries[1] - tries[0];
  assert.ok(waited >= 790, `waited ${waited.toFixed(0)} ms`);
});

test("CORS: a preflight needs no key, only listed origins are let in", async () => {
  const ask = (origin) =>
    fetch(`${narrow.url}/v1/chat/completions`, {
      method: "OPTIONS",
      headers: { Origin: origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization" },
    });
  const yes = await ask("https://app.example");
  assert.equal(yes.status, 204);
  assert.equal(yes.headers.get("access-control-allow-origin"), "https://app.example");
  assert.match(yes.headers.get("access-control-allow-methods"), /POST/);
  assert.match(yes.headers.get("access-control-allow-headers"), /authorization/i);
  const no = await ask("https://other.example");
  assert.equal(no.headers.get("access-control-allow-origin"), null);
  const off = await fetch(`${dense.url}/v1/models`, { headers: { Origin: "https://app.example" } });
  assert.equal(off.headers.get("access-control-allow-origin"), null);
  const page = clientOf(narrow, { dangerouslyAllowBrowser: true, defaultHeaders: { Origin: "https://app.example" } });
  const { response } = await page.models.list().withResponse();
  assert.equal(response.headers.get("access-control-allow-origin"), "https://app.example");
  assert.match(response.headers.get("access-control-expose-headers"), /x-request-id/i);
});

test("a drain lets streams end, answers 503 that the SDK retries, and the process ends well", async () => {
  const s = await Server.start(madeModel("tiny-dense"), "--threads", "1", "--max-model-len", "32768", "--timeout-graceful-shutdown", "600");
  const client = clientOf(s);
  const stream = await client.completions.create({ model: "any", prompt: "x", max_tokens: 12000, ignore_eos: true, stream: true });
  const reading = collect(stream);
  await s.untilMetric("num_requests_running", 1);
  const ended = s.stop();
  const status = () => fetch(`${s.url}/health`).then((a) => a.status, () => 503); // refused: it has ended already
  while ((await status()) !== 503) await sleep(2);
  let tries = 0;
  const again = clientOf(s, { maxRetries: 1, fetch: (...a) => (tries++, fetch(...a)) });
  await assert.rejects(again.models.list(), (e) => {
    if (e instanceof OpenAI.APIConnectionError) return true; // it ended between the two tries
    assert.equal(e.status, 503);
    assert.match(e.message, /shutting down/);
    return true;
  });
  assert.equal(tries, 2);
  assert.equal((await reading).finish, "length");
  assert.equal(await ended, 0);
});
