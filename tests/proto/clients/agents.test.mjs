// The libraries agents are built with, against a running server: the Vercel AI SDK by both of its OpenAI providers, and
// LangChain. Text, usage, reasoning, tools, errors, retries, aborts.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { library, madeModel, scripted, Server, thinkingModel } from "./house.mjs";

const { generateText, streamText, jsonSchema, tool, stepCountIs } = library("ai");
const { createOpenAICompatible } = library("@ai-sdk/openai-compatible");
const { createOpenAI } = library("@ai-sdk/openai");

const CALL = ["<tool_call>\n", '{"name": "get_weather", "arguments": ', '{"city": "北京", "days": 2}}', "\n</tool_call>\n"];
const ARGS = { city: "北京", days: 2 };
const ENDLESS = { max_tokens: 30000, ignore_eos: true };
const quiet = { maxRetries: 0, onError() {} };

let dense, thinking, narrow;
before(async () => {
  dense = await Server.start(madeModel("tiny-dense"), "--threads", "1", "--max-model-len", "32768");
  thinking = await Server.start(thinkingModel(), "--threads", "1");
  narrow = await Server.start(
    madeModel("tiny-dense"), "--threads", "1", "--max-model-len", "32768", "--max-concurrency", "1", "--api-key", "sesame",
  );
});
after(() => Promise.all([dense, thinking, narrow].map((s) => s.stop())));

// The libraries send only fields they know; the others are written in by the fetch they are given. With a list, the
// n-th request gets the n-th.
function writing(fields, calls = [], after = () => {}) {
  return async (url, init) => {
    const more = Array.isArray(fields) ? fields[calls.length] : fields;
    calls.push(performance.now());
    const answer = await fetch(url, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), ...more }) });
    await after(calls);
    return answer;
  };
}
const providers = {
  compat: (s, fields, calls, apiKey = "sesame", answered) =>
    createOpenAICompatible({
      name: "ernest", baseURL: `${s.url}/v1`, apiKey, includeUsage: true, fetch: writing(fields, calls, answered),
    })("any"),
  openai: (s, fields, calls, apiKey = "sesame", answered) =>
    createOpenAI({ baseURL: `${s.url}/v1`, apiKey, fetch: writing(fields, calls, answered) }).chat("any"),
};

async function parts(result) {
  const all = { text: "", reasoning: "", calls: [], errors: [], finish: null, usage: null };
  for await (const part of result.fullStream) {
    if (part.type === "text-delta") all.text += part.text;
    if (part.type === "reasoning-delta") all.reasoning += part.text;
    if (part.type === "tool-call") all.calls.push([part.toolName, part.input]);
    if (part.type === "error") all.errors.push(part.error);
    if (part.type === "finish") [all.finish, all.usage] = [part.finishReason, part.totalUsage];
  }
  return all;
}

for (const [name, model] of Object.entries(providers)) {
  test(`ai/${name}: whole and streamed text are the same, with usage`, async () => {
    const ask = { model: model(dense, { ignore_eos: true }), prompt: "Hello", maxOutputTokens: 20, seed: 3, temperature: 1.2 };
    const whole = await generateText({ ...ask, maxRetries: 0 });
    const streamed = await parts(streamText({ ...ask, ...quiet }));
    assert.deepEqual(streamed.errors, []);
    assert.equal(streamed.text, whole.text);
    assert.ok(whole.text.length > 0);
    assert.deepEqual([streamed.finish, whole.finishReason], ["length", "length"]);
    assert.equal(streamed.usage.outputTokens, 20);
    assert.deepEqual(streamed.usage, whole.usage);
    const stop = whole.text.slice(6, 9);
    const cut = await parts(streamText({ ...ask, stopSequences: [stop], ...quiet }));
    assert.deepEqual([cut.text, cut.finish], [whole.text.slice(0, whole.text.indexOf(stop)), "stop"]);
  });

  test(`ai/${name}: a tool is called with its arguments and the loop ends in text`, async () => {
    const replies = [scripted("I should look that up. ", "\n</think>\n\n", ...CALL), scripted("\n</think>\n\n", "It is sunny. ")];
    const asked = [];
    const tools = {
      get_weather: tool({
        inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" }, days: { type: "number" } } }),
        execute: async (args) => (asked.push(args), { sky: "clear" }),
      }),
    };
    const ask = { prompt: "Weather?", tools, stopWhen: stepCountIs(3) };
    const whole = await generateText({ ...ask, model: model(thinking, replies), maxRetries: 0 });
    assert.equal(whole.text, "It is sunny. ");
    assert.equal(whole.steps.length, 2);
    const streamed = await parts(streamText({ ...ask, model: model(thinking, replies), ...quiet }));
    assert.deepEqual(streamed.errors, []);
    assert.deepEqual(streamed.calls, [["get_weather", ARGS]]);
    assert.deepEqual([streamed.text, streamed.finish], ["It is sunny. ", "stop"]);
    assert.deepEqual(asked, [ARGS, ARGS]);
  });

  test(`ai/${name}: errors keep their message, streaming or not`, async () => {
    const ask = { prompt: "Hello" };
    for (const [fields, key, status, message] of [
      [{ temperature: 9 }, "sesame", 400, /temperature/],
      [{ max_tokens: 1e6 }, "sesame", 400, /32768/],
      [{}, "wrong", 401, /API key/],
    ]) {
      const check = (e) => {
        assert.equal(e.statusCode, status, `${e}`);
        assert.match(e.message, message);
        return true;
      };
      await assert.rejects(generateText({ ...ask, model: model(narrow, fields, [], key), maxRetries: 0 }), check);
      const streamed = await parts(streamText({ ...ask, model: model(narrow, fields, [], key), ...quiet }));
      assert.equal(streamed.errors.length, 1);
      check(streamed.errors[0]);
    }
  });

  test(`ai/${name}: a 429 is tried again after the time it names`, async () => {
    const stop = new AbortController();
    const body = { prompt: "x", stream: true, ...ENDLESS };
    const headers = { Authorization: "Bearer sesame" };
    await narrow.post("/v1/completions", body, { headers, signal: stop.signal }); // nobody reads: it stays
    const calls = [];
    const freeOnce = async () => {
      if (calls.length > 1) return;
      stop.abort(); // once it was refused: the place is free before it comes again
      await narrow.untilFree("sesame");
      calls[0] = performance.now();
    };
    const patient = model(narrow, { max_tokens: 2, ignore_eos: true }, calls, "sesame", freeOnce);
    const later = await generateText({ model: patient, prompt: "x", maxRetries: 3 });
    assert.equal(later.usage.outputTokens, 2);
    assert.equal(calls.length, 2);
    const waited = calls[1] - calls[0];
    assert.ok(waited >= 790, `waited ${waited.toFixed(0)} ms`);
  });

  test(`ai/${name}: an abort frees the place within 100 ms`, async () => {
    const tries = [];
    do {
      const stop = new AbortController();
      const long = streamText({ model: model(narrow, ENDLESS), prompt: "x", abortSignal: stop.signal, ...quiet });
      let n = 0;
      for await (const part of long.fullStream) if (part.type === "text-delta" && ++n === 5) stop.abort();
      assert.ok(n >= 5);
      tries.push(await narrow.freedWithin());
      await narrow.untilFree("sesame");
    } while (tries.every((t) => t.ms >= t.allowed) && tries.length < 3);
    assert.ok(tries.some((t) => t.ms < t.allowed), `free only after ${tries.map((t) => t.ms.toFixed(0))} ms`);
  });
}

test("ai/compat: reasoning is told once, apart from the text", async () => {
  const words = ["I should look that up. ", "\n</think>\n\n", "<response>\n", "It is sunny. ", "你好 😀", "\n</response>\n"];
  const model = providers.compat(thinking, scripted(...words));
  const whole = await generateText({ model, prompt: "Weather?", maxRetries: 0 });
  const streamed = await parts(streamText({ model, prompt: "Weather?", ...quiet }));
  assert.deepEqual([whole.text, whole.reasoningText], ["It is sunny. 你好 😀", "I should look that up. "]);
  assert.deepEqual([streamed.text, streamed.reasoning], [whole.text, whole.reasoningText]);
  assert.equal(streamed.usage.outputTokenDetails.reasoningTokens, 2);
});

test("ai/openai and compat: the completions endpoint", async () => {
  const base = { baseURL: `${dense.url}/v1`, apiKey: "none", fetch: writing({ ignore_eos: true, temperature: 0 }) };
  const texts = [];
  for (const model of [
    createOpenAI(base).completion("any"),
    createOpenAICompatible({ ...base, name: "ernest" }).completionModel("any"),
  ]) {
    const streamed = await parts(streamText({ model, prompt: "Hello", maxOutputTokens: 9, ...quiet }));
    assert.deepEqual([streamed.errors, streamed.finish], [[], "length"]);
    texts.push(streamed.text, (await generateText({ model, prompt: "Hello", maxOutputTokens: 9, maxRetries: 0 })).text);
  }
  assert.equal(new Set(texts).size, 1, `${texts}`);
});

// ---- LangChain ---------------------------------------------------------------------------------------------------

const tooOld = parseInt(process.versions.node) < 20 && "LangChain needs node 20";

test("langchain: text, usage, one finish reason, logprobs", { skip: tooOld }, async () => {
  const { ChatOpenAI } = library("@langchain/openai");
  const chat = (s, more) =>
    new ChatOpenAI({ model: "any", apiKey: "sesame", configuration: { baseURL: `${s.url}/v1` }, maxRetries: 0, ...more });
  const modelKwargs = { seed: 5, ignore_eos: true };
  const whole = await chat(dense, { maxTokens: 15, modelKwargs }).invoke("Hello");
  let all;
  for await (const chunk of await chat(dense, { maxTokens: 15, modelKwargs }).stream("Hello"))
    all = all === undefined ? chunk : all.concat(chunk);
  assert.equal(all.content, whole.content);
  assert.equal(all.response_metadata.finish_reason, "length");
  assert.equal(all.usage_metadata.output_tokens, 15);
  assert.equal(whole.usage_metadata.output_tokens, 15);
  const scored = await chat(dense, { maxTokens: 4, modelKwargs, logprobs: true }).invoke("Hello");
  assert.equal(scored.response_metadata.logprobs.content.length, 4);
  await assert.rejects(chat(narrow, { apiKey: "wrong" }).invoke("Hello"), /API key/);
  await assert.rejects(chat(dense, { modelKwargs: { temperature: 9 } }).invoke("Hello"), /temperature/);
});

test("langchain: a tool call is valid, streamed and whole", { skip: tooOld }, async () => {
  const { ChatOpenAI } = library("@langchain/openai");
  const modelKwargs = scripted("I should look that up. ", "\n</think>\n\n", ...CALL);
  const chat = new ChatOpenAI({
    model: "any", apiKey: "none", configuration: { baseURL: `${thinking.url}/v1` }, maxRetries: 0, modelKwargs,
  }).bindTools([{ type: "function", function: { name: "get_weather", parameters: { type: "object", properties: {} } } }]);
  const whole = await chat.invoke("Weather?");
  let all;
  for await (const chunk of await chat.stream("Weather?")) all = all === undefined ? chunk : all.concat(chunk);
  for (const message of [whole, all]) {
    assert.equal(message.invalid_tool_calls?.length ?? 0, 0);
    assert.equal(message.tool_calls.length, 1);
    assert.deepEqual([message.tool_calls[0].name, message.tool_calls[0].args], ["get_weather", ARGS]);
    assert.equal(message.response_metadata.finish_reason, "tool_calls");
  }
});
