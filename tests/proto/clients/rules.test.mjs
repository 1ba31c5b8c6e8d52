// Our bytes against rules.mjs: many request shapes on three models, streamed and whole, and the two compared; then the
// checker itself, which must notice every deviation when it is put into a good stream of ours.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { madeModel, scripted, Server, thinkingModel, SLOW } from "./house.mjs";
import { BODY_RULES, checkBody, checkError, checkStream, ERROR_RULES, parseStream, STREAM_RULES } from "./rules.mjs";

const CHAT = "/v1/chat/completions";
const TEXT = "/v1/completions";
const user = (content) => [{ role: "user", content }];
const weather = {
  type: "function",
  function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } },
};
const CALL = ["<tool_call>\n", '{"name": "get_weather", "arguments": ', '{"city": "北京", "days": 2}}', "\n</tool_call>\n"];
const WHOLE_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "x"}}\n</tool_call>';
const ODD_CALL = ["<tool_call>\n", "{not JSON}", "\n</tool_call>"];
const PARTS = [{ type: "text", text: "Hel" }, { type: "text", text: "lo" }];

// [path, body]; every one is sent whole and streamed.
const SHAPES = [
  [CHAT, { messages: user("Hello") }],
  [CHAT, { messages: user("Hello"), n: 3 }],
  [CHAT, { messages: user("Hello"), n: 8, temperature: 2, top_p: 1 }],
  [CHAT, { messages: user(PARTS) }],
  [CHAT, { messages: [{ role: "developer", content: "Be brief." }, ...user("你好 😀")] }],
  [CHAT, { messages: [...user("a"), { role: "assistant", content: "b" }, ...user("c")], max_tokens: 1 }],
  [CHAT, { messages: user("Hello"), max_completion_tokens: 7 }],
  [CHAT, { messages: user("Hello"), temperature: 0 }],
  [CHAT, { messages: user("Hello"), top_p: 1, temperature: 2, max_tokens: 100, ignore_eos: true }],
  [CHAT, { messages: user("Hello"), top_k: 5, min_p: 0.1, frequency_penalty: 1, presence_penalty: 1 }],
  [CHAT, { messages: user("Hello"), stop: ["e", "word"], temperature: 1.5, max_tokens: 40 }],
  [CHAT, { messages: user("Hello"), stop: "e", include_stop_str_in_output: true, max_tokens: 40 }],
  [CHAT, { messages: user("Hello"), logprobs: true }],
  [CHAT, { messages: user("Hello"), logprobs: true, top_logprobs: 5, n: 2 }],
  [CHAT, { messages: user("Hello"), return_token_ids: true }],
  [CHAT, { messages: user("Hello"), max_streaming_response_tokens: 4 }],
  [CHAT, { messages: user("Hello"), logit_bias: { 2: 100 } }],
  [CHAT, { messages: user("Hello"), user: "me", metadata: {}, some_unknown_field: [1, { a: 2 }] }],
  [CHAT, { messages: user("Hello"), prompt_logprobs: 1 }],
  [CHAT, { messages: user("x".repeat(700)), max_tokens: 3 }],
  [TEXT, { prompt: "Hello" }],
  [TEXT, { prompt: ["Hello", "there", "you"] }],
  [TEXT, { prompt: [20, 30, 40] }],
  [TEXT, { prompt: [[20, 30], [40]], n: 2 }],
  [TEXT, { prompt: "Hello", echo: true }],
  [TEXT, { prompt: ["Hello", "there"], echo: true, logprobs: 2, n: 2 }],
  [TEXT, { prompt: "Hello", echo: true, max_tokens: 0, logprobs: 1 }],
  [TEXT, { prompt: "Hello", logprobs: 0 }],
  [TEXT, { prompt: "Hello", stop: ["e"], temperature: 1.5, max_tokens: 40 }],
  [TEXT, { prompt: "Hello", n: 4, best_of: 4, return_token_ids: true }],
  [TEXT, { prompt: "Hello", ignore_eos: true, min_tokens: 30, max_tokens: 30 }],
  // ids that the model has and the tokenizer has not
  [TEXT, { prompt: "Hello", allowed_token_ids: [1022, 1023], return_token_ids: true, logprobs: 2 }],
  [CHAT, { messages: user("Hello"), allowed_token_ids: [1022, 1023], return_token_ids: true, logprobs: true }],
  [TEXT, { prompt: "Hello", suffix: null, logit_bias: { 2: 100 } }],
];
// Written replies, for the thinking model: reasoning, tool calls one and two, calls that are none, an open end.
const SCRIPTED = [
  ["I should look that up. ", "\n</think>\n\n", ...CALL],
  ["\n</think>\n\n", "<tool_call>\n{\"name\": \"get_time\", ", '"arguments": {}}', "\n</tool_call>", "It is sunny. "],
  ["\n</think>\n\n", "<tool_call>\n{\"name\": \"get_time\", ", '"arguments": {}}', "\n</tool_call>", WHOLE_CALL],
  ["I should look that up. ", "Then I answer.\n", "\n</think>\n\n", "<response>\n", "你好 😀", "\n</response>\n"],
  ["I should look that up. ", "\n</think>\n\n", ...ODD_CALL, "It is sunny. "],
  ["\n</think>\n\n", "It is sunny. ", "<tool_call>\n", '{"name": "get_weather", "arguments": '],
  ["I should look that up. ", "Then I answer.\n"],
];

function askedOf(path, body) {
  const options = body.stream ? body.stream_options : undefined;
  const prompts = path === TEXT && Array.isArray(body.prompt) && typeof body.prompt[0] !== "number" ? body.prompt.length : 1;
  return {
    kind: path === CHAT ? "chat" : "text",
    n: prompts * (body.n ?? 1),
    includeUsage: options ? options.include_usage ?? true : false,
    continuousUsage: options?.continuous_usage_stats ?? false,
    logprobs: path === CHAT ? body.logprobs === true : Number.isInteger(body.logprobs),
    body,
  };
}

async function whole(server, path, body) {
  const answer = await server.post(path, body);
  const text = await answer.text();
  return { status: answer.status, headers: answer.headers, text, json: JSON.parse(text), asked: askedOf(path, body) };
}

async function stream(server, path, body) {
  const answer = await server.post(path, body);
  const bytes = await answer.arrayBuffer();
  return parseStream(bytes, askedOf(path, body), answer.status, answer.headers);
}

// What a client would show: [{text, reasoning, calls, finish}] by index.
function shownOf(parsed) {
  const all = [];
  for (const c of parsed.choices) {
    const to = (all[c.index] ??= { text: "", reasoning: "", calls: [], finish: null });
    const d = c.delta ?? { content: c.text };
    to.text += d.content ?? "";
    to.reasoning += d.reasoning_content ?? "";
    for (const k of d.tool_calls ?? []) {
      const call = (to.calls[k.index] ??= { name: "", args: "" });
      call.name += k.function.name ?? "";
      call.args += k.function.arguments;
    }
    to.finish = c.finish_reason ?? to.finish;
  }
  return all;
}
const shownWhole = (json) =>
  json.choices.map((c) => ({
    text: c.message ? (c.message.content ?? "") : c.text,
    reasoning: c.message?.reasoning_content ?? "",
    calls: (c.message?.tool_calls ?? []).map((k) => ({ name: k.function.name, args: k.function.arguments })),
    finish: c.finish_reason,
  }));

const servers = {};
before(async () => {
  servers.dense = await Server.start(madeModel("tiny-dense"), "--threads", "1");
  servers.moe = await Server.start(madeModel("tiny-moe"), "--threads", "1");
  servers.thinking = await Server.start(thinkingModel(), "--threads", "1");
});
after(() => Promise.all(Object.values(servers).map((s) => s.stop())));

// What was found in the prefix cache depends on who asked before.
const uncached = (usage) => ({ ...usage, prompt_tokens_details: { ...usage.prompt_tokens_details, cached_tokens: 0 } });

let seen = 0;
async function bothWays(server, path, shape) {
  const body = { seed: 11, max_tokens: 16, ...shape };
  if (body.max_completion_tokens) delete body.max_tokens;
  const a = await whole(server, path, body);
  assert.equal(a.status, 200, a.text);
  assert.deepEqual(checkBody(a), [], JSON.stringify(body));
  const options = [undefined, {}, { include_usage: true }, { include_usage: false }];
  options.push({ include_usage: true, continuous_usage_stats: true });
  const parsed = [];
  for (const stream_options of options) {
    const s = await stream(server, path, { ...body, stream: true, ...(stream_options && { stream_options }) });
    assert.deepEqual(checkStream(s), [], `${JSON.stringify(body)} ${JSON.stringify(stream_options)}\n${s.text}`);
    assert.deepEqual(shownOf(s), shownWhole(a.json), `streamed and whole differ: ${JSON.stringify(body)}`);
    if (s.asked.includeUsage) assert.deepEqual(uncached(s.parts[s.parts.length - 1].usage), uncached(a.json.usage));
    parsed.push(s);
    seen++;
  }
  return { a, parsed };
}

for (const model of ["dense", "moe", "thinking"]) {
  test(`${model}: every shape, whole and streamed five ways, keeps every rule and says the same`, async () => {
    for (const [path, shape] of SHAPES) await bothWays(servers[model], path, shape);
  });
}

test("thinking: written replies with reasoning and tool calls keep every rule", async () => {
  const kinds = new Set();
  for (const words of SCRIPTED) {
    for (const more of [{}, { n: 2 }, { max_streaming_response_tokens: 3 }, { logprobs: true }, { max_tokens: 4 }]) {
      const shape = { messages: user("What is the weather?"), tools: [weather], ...scripted(...words), ...more };
      const { a } = await bothWays(servers.thinking, CHAT, shape);
      for (const c of shownWhole(a.json)) kinds.add(`${c.calls.length} calls, ${c.finish}`);
    }
  }
  // the replies were really what they were written to be
  for (const kind of ["0 calls, stop", "1 calls, tool_calls", "2 calls, tool_calls", "0 calls, length"])
    assert.ok(kinds.has(kind), `no reply with ${kind}: ${[...kinds]}`);
});

test("characters are whole when their bytes are tokens, and one cut off at the end is one U+FFFD", async () => {
  const byteIds = (text) => [...Buffer.from(text)].map((b) => 13 + b);
  for (const [ids, text] of [
    [byteIds("😀"), "😀"],
    [byteIds("é京"), "é京"],
    [byteIds("😀").slice(0, 3), "\ufffd"],
    [[...byteIds("a"), ...byteIds("京").slice(0, 2)], "a\ufffd"],
  ]) {
    const shape = { prompt: "x", ...scripted(...ids), logprobs: 0 };
    const { a, parsed } = await bothWays(servers.dense, TEXT, shape);
    assert.equal(a.json.choices[0].text, text);
    const pieces = parsed[0].choices.map((c) => c.text).join("|");
    assert.ok(!/\ufffd./.test(pieces.replaceAll("|", "")), pieces);
  }
});

test("errors of every status are objects that say when to come back", async () => {
  const s = servers.dense;
  const answers = [
    await s.post(CHAT, "{"),
    await s.post(CHAT, { messages: user("x"), temperature: 9 }),
    await s.post(CHAT, { messages: user("x"), max_tokens: 1e6 }),
    await s.post("/v1/nothing", {}),
    await fetch(s.url + CHAT),
    await fetch(s.url + "/v1/models/other"),
    await fetch(s.url + "/v1/models", { method: "DELETE" }),
    await s.post(CHAT, { messages: user("x".repeat(9 << 20)) }),
    await s.post(CHAT, { messages: user("x") }, { headers: { "X-Request-Deadline-Ms": "soon" } }),
  ];
  const statuses = [];
  for (const answer of answers) {
    const text = await answer.text();
    let json;
    try {
      json = JSON.parse(text);
    } catch {
      json = undefined;
    }
    assert.deepEqual(checkError({ status: answer.status, headers: answer.headers, text, json }), [], text);
    statuses.push(answer.status);
  }
  assert.deepEqual(statuses, [400, 400, 400, 404, 405, 404, 405, 413, 400]);
});

test("a silent stream carries pings, and an error in a stream is an object and then [DONE]", async () => {
  // One place to compute in: the second request waits silently behind the first.
  const s = await Server.start(madeModel("tiny-dense"), "--threads", "1", "--max-num-seqs", "1", "--max-model-len", "65536");
  const stop = new AbortController();
  const long = await s.post(TEXT, { prompt: "x", max_tokens: 60000, ignore_eos: true, stream: true }, { signal: stop.signal });
  const reading = (async () => {
    for await (const piece of long.body) assert.ok(piece.length); // an unread stream would give up its place
  })().catch((e) => assert.equal(e.name, "AbortError"));
  const body = { messages: user("x"), stream: true, sse_ping_interval: 1, max_tokens: 4, stream_options: {} };
  const waiting = await s.post(CHAT, body);
  const late = { "X-Request-Deadline-Ms": "300" };
  const cut = await s.post(CHAT, body, { headers: late });
  const broken = parseStream(await cut.arrayBuffer(), askedOf(CHAT, body), cut.status, cut.headers);
  assert.deepEqual(checkStream(broken), [], broken.text);
  assert.equal(broken.errors[0]?.error.code, "deadline_exceeded", broken.text);
  const bytes = [];
  for await (const piece of waiting.body) {
    bytes.push(piece);
    if (!stop.signal.aborted && Buffer.concat(bytes).includes(": ping\n\n")) stop.abort(); // the place is free now
  }
  await reading;
  const done = parseStream(Buffer.concat(bytes), askedOf(CHAT, body), waiting.status, waiting.headers);
  assert.deepEqual(checkStream(done), [], done.text);
  assert.ok(done.frames.some((f) => f.comment === " ping"), `no ping in\n${done.text}`);
  assert.equal(await s.stop(), 0);
});

// ---- the checker -------------------------------------------------------------------------------------------------

// Deviations put into good streams: [rule that must notice, stream, what is done to its text]. The streams are
// "n" (two choices, usage), "call" (reasoning, one call), "error".
const json = (f) => (text) =>
  text
    .split("\n\n")
    .filter((e) => e)
    .flatMap((e, i, all) => {
      if (!e.startsWith("data: {")) return [e];
      const chunk = JSON.parse(e.slice(6));
      const now = f(chunk, i, all.length);
      return (now === undefined ? [chunk] : [now].flat()).map((c) => `data: ${JSON.stringify(c)}`);
    })
    .map((e) => `${e}\n\n`)
    .join("");
const onCall = (f) => json((c) => void c.choices?.[0]?.delta.tool_calls?.forEach((k) => f(k)));
const opening = (f) => onCall((k) => k.id && f(k));
const later = (f) => onCall((k) => !k.id && f(k));
const finish = (f) => json((c) => void (c.choices?.[0]?.finish_reason && f(c)));

const DEVIATIONS = [
  ["role first", "n", json((c) => void (c.choices[0] && delete c.choices[0].delta.role))],
  ["role first", "n", json((c) => void (c.choices[0]?.index === 1 && delete c.choices[0].delta.role))],
  ["role first", "n", json((c) => void (c.choices[0]?.delta.role && delete c.choices[0].delta.content))],
  ["role first", "n", json((c) => void (c.choices[0]?.delta.role && (c.choices[0].delta.content = null)))],
  ["role first", "n", json((c) => void (c.choices[0] && (c.choices[0].delta.role = "assistant")))],
  ["role first", "n", json((c) => void (c.choices[0]?.delta.role && (c.choices[0].delta.role = "model")))],
  ["text is text", "n", json((c) => void (c.choices[0]?.delta.content && (c.choices[0].delta.content = null)))],
  ["text is text", "call", json((c) => void (c.choices[0]?.delta.reasoning && delete c.choices[0].delta.content))],
  ["one finish", "n", json((c) => (c.choices[0]?.finish_reason ? [] : c))],
  ["one finish", "n", json((c) => (c.choices[0]?.finish_reason ? [c, c] : c))],
  ["one finish", "n", finish((c) => void (c.choices[0].finish_reason = null))],
  ["one finish", "n", finish((c) => void (c.choices[0].delta.content = ""))],
  ["choice keys", "n", json((c) => void (c.choices[0] && !c.choices[0].finish_reason && delete c.choices[0].finish_reason))],
  ["choice keys", "n", json((c) => void (c.choices[0] && delete c.choices[0].logprobs))],
  ["choice keys", "n", json((c) => void (c.choices[0] && delete c.choices[0].index))],
  ["choice keys", "n", json((c) => void (c.choices[0]?.finish_reason && (c.choices[0].delta = null)))],
  ["choice keys", "n", json((c) => void (c.choices[0] && (c.choices[0].index += 1)))],
  ["every choice", "n", json((c) => void (c.choices[0] && (c.choices[0].index = 0)))],
  ["finish words", "n", finish((c) => void (c.choices[0].finish_reason = "recover_stop"))],
  ["finish words", "n", finish((c) => void (c.choices[0].finish_reason = "abort"))],
  ["chunk keys", "n", json((c) => void (c.choices.length === 0 && delete c.choices))],
  ["chunk keys", "n", json((c) => void (c.object = "chat.completion"))],
  ["chunk keys", "n", json((c) => void (c.id = ""))],
  ["one identity", "n", json((c, i) => void (c.id += i))],
  ["one identity", "n", json((c, i) => void (c.created += i))],
  ["one identity", "n", json((c, i) => void (i === 3 && (c.model = "other")))],
  ["usage when asked", "n", json((c) => (c.choices.length ? c : []))],
  ["usage when asked", "n", json((c, i) => (i === 2 ? [{ ...c, choices: [] }, c] : c))],
  ["usage when asked", "n", json((c, i) => void (i === 2 && (c.usage = { prompt_tokens: 1 })))],
  ["usage when asked", "n", json((c) => void (c.choices.length && delete c.usage))],
  ["usage when asked", "n", json((c) => void (c.usage && c.usage.total_tokens++))],
  ["usage when asked", "n", json((c) => void (c.usage && delete c.usage.prompt_tokens_details))],
  ["usage when asked", "call", json((c) => void (c.usage = null))],
  ["done", "n", (t) => t.replace("data: [DONE]\n\n", "")],
  ["done", "n", (t) => `${t}data: [DONE]\n\n`],
  ["done", "n", (t) => `data: [DONE]\n\n${t.replace("data: [DONE]\n\n", "")}`],
  ["done", "n", (t) => `${t}: late\n\n`],
  ["framing", "n", (t) => t.replaceAll("\n", "\r\n")],
  ["framing", "n", (t) => t.replaceAll("data: ", "data:")],
  ["framing", "n", (t) => t.replace("}\n", "} \n")],
  ["framing", "n", (t) => t.replace("data: ", "event: message\ndata: ")],
  ["framing", "n", (t) => t.replace('"choices":', '\ndata: "choices":')],
  ["framing", "n", (t) => t.replace("\n\n", "\n\n\n")],
  ["framing", "n", (t) => t.replace("\n\n", "\n")],
  ["framing", "n", (t) => t.slice(0, -1)],
  ["comments", "n", (t) => `: OPENROUTER PROCESSING\n\n${t}`],
  ["whole characters", "call", (t) => Buffer.from(t).subarray(0, Buffer.from(t).indexOf("北") + 1)],
  ["whole characters", "call", (t) => t.replace("北", "\\ud83d")],
  ["reasoning under both names", "call", json((c) => void (c.choices[0] && delete c.choices[0].delta.reasoning))],
  ["reasoning under both names", "call", json((c) => void (c.choices[0] && delete c.choices[0].delta.reasoning_content))],
  ["calls counted from 0", "call", onCall((k) => delete k.index)],
  ["calls counted from 0", "call", onCall((k) => (k.index = 1))],
  ["calls counted from 0", "call", later((k) => (k.index = 2))],
  ["a call opens whole", "call", opening((k) => delete k.type)],
  ["a call opens whole", "call", onCall((k) => delete k.id)],
  ["a call opens whole", "call", opening((k) => (k.function.arguments = null))],
  ["a call opens whole", "call", opening((k) => delete k.function.arguments)],
  ["a call opens whole", "call", opening((k) => (k.function.name = ""))],
  ["a call goes on with arguments only", "call", later((k) => (k.function.name = "get_weather"))],
  ["a call goes on with arguments only", "call", later((k) => (k.id = ""))],
  ["a call goes on with arguments only", "call", later((k) => (k.id = null))],
  ["arguments are text", "call", later((k) => (k.function.arguments = { city: "x" }))],
  ["arguments are text", "call", later((k) => (k.function.arguments = "{"))],
  ["no empty list of calls", "call", json((c) => void (c.choices[0]?.delta.role && (c.choices[0].delta.tool_calls = [])))],
  ["no empty list of calls", "call", json((c) => void (c.choices[0] && (c.choices[0].delta.tool_calls ??= null)))],
  ["calls finish with tool_calls", "call", finish((c) => void (c.choices[0].finish_reason = "stop"))],
  ["calls finish with tool_calls", "n", finish((c) => void (c.choices[0].finish_reason = "tool_calls"))],
  ["errors are objects", "error", json((c) => (c.error ? { object: "error", message: c.error.message, code: 500 } : c))],
  ["errors are objects", "error", json((c) => (c.error ? { detail: c.error.message } : c))],
  ["errors are objects", "error", json((c) => void (c.error && (c.error.code = 504)))],
  ["errors are objects", "error", json((c) => void (c.error && delete c.error.param))],
  ["errors are objects", "error", json((c) => void (c.error && (c.error.message = "")))],
  ["errors are objects", "error", json((c) => (c.error ? [c, c] : c))],
  ["done", "error", (t) => t.replace("data: [DONE]\n\n", "")],
  ["logprobs", "n", json((c) => void (c.choices[0] && (c.choices[0].logprobs = { content: [] })))],
];

test("the checker notices every deviation put into a good stream", async () => {
  const said = { messages: user("Hello"), max_tokens: 3, seed: 1, stream: true };
  const call = { ...said, max_tokens: 16, tools: [weather], ...scripted("I should look that up. ", "\n</think>\n\n", ...CALL) };
  const good = {
    n: await stream(servers.dense, CHAT, { ...said, n: 2, stream_options: { include_usage: true } }),
    call: await stream(servers.thinking, CHAT, call),
    error: undefined,
  };
  const e = { error: { message: "m", type: "t", param: null, code: null } };
  const cut = json((c, i) => (i > 3 ? [] : c))(good.call.text.replace("data: [DONE]\n\n", ""));
  good.error = parseStream(Buffer.from(`${cut}data: ${JSON.stringify(e)}\n\ndata: [DONE]\n\n`), good.call.asked, 200, good.call.headers);
  for (const [name, s] of Object.entries(good)) assert.deepEqual(checkStream(s), [], name);

  const never = new Set(STREAM_RULES.map((r) => r.name));
  for (const [i, [rule, name, deviate]] of DEVIATIONS.entries()) {
    const s = good[name];
    const bytes = Buffer.from(deviate(s.text));
    assert.ok(!bytes.equals(s.bytes), `deviation ${i} (${rule}) changes nothing`);
    const found = checkStream(parseStream(bytes, s.asked, s.status, s.headers)).map((c) => c.rule);
    assert.ok(found.includes(rule), `deviation ${i} (${rule}) was not noticed; found ${found}`);
    never.delete(rule);
  }
  const bare = checkStream(parseStream(good.n.bytes, good.n.asked, 200, new Headers())).map((c) => c.rule);
  assert.deepEqual(bare, ["headers"]);
  never.delete("headers");
  assert.deepEqual([...never], ["usage grows"], "rules without a deviation");
  const falling = { ...good.n.asked, continuousUsage: true };
  assert.ok(checkStream(parseStream(good.n.bytes, falling, 200, good.n.headers)).length > 0);
});

test("the checker notices bad error answers and bad whole answers", async () => {
  const h = new Headers({ "content-type": "application/json", "x-request-id": "r" });
  const e = { message: "m", type: "t", param: null, code: null };
  const bad = (status, body, headers = h) =>
    checkError({ status, headers, text: JSON.stringify(body), json: body }).map((c) => c.rule);
  assert.deepEqual(bad(400, { error: e }), []);
  assert.deepEqual(bad(429, { detail: "Too many requests" }), ["an error object", "when to come back"]);
  assert.deepEqual(bad(400, { object: "error", message: "m", type: "t", param: null, code: 400 }), ["an error object"]);
  assert.deepEqual(bad(400, { error: { ...e, code: 400 } }), ["an error object"]);
  assert.deepEqual(bad(304, { error: e }), ["a real status"]);
  assert.deepEqual(bad(400, { error: e }, new Headers({ "content-type": "application/json" })), ["an id"]);
  assert.equal(ERROR_RULES.length, 4);

  const { a } = await bothWays(servers.dense, CHAT, { messages: user("Hello") });
  const changed = (f) => {
    const b = structuredClone(a.json);
    f(b);
    return checkBody({ ...a, json: b }).map((c) => c.rule);
  };
  assert.deepEqual(changed(() => {}), []);
  assert.deepEqual(changed((b) => delete b.usage.completion_tokens_details), ["answer usage"]);
  assert.deepEqual(changed((b) => delete b.choices[0].message.content), ["answer keys"]);
  assert.deepEqual(changed((b) => (b.choices[0].message.tool_calls = [])), ["answer calls"]);
  assert.deepEqual(changed((b) => (b.choices[0].logprobs = { content: [] })), ["answer logprobs"]);
  assert.deepEqual(checkBody({ ...a, headers: new Headers() }).map((c) => c.rule), ["json type"]);
  assert.equal(BODY_RULES.length, 5);
});

test("how much was looked at", (t) => {
  t.diagnostic(`${seen} streams under ${STREAM_RULES.length} rules, ${DEVIATIONS.length} deviations noticed`);
  assert.ok(seen >= 600 && DEVIATIONS.length >= 49 && SLOW >= 1, `${seen} ${DEVIATIONS.length}`);
});
