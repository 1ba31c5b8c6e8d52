// The rules our answers keep so that no client breaks, each with the deviation that was measured to break one
// (shapes sent by a mock server to openai-node raw and .stream(), both AI SDK providers and LangChain) or that broke one
// in public. A rule looks at the bytes of an answer and says what is wrong with them, or nothing.
//
// `asked` is the request: {kind: "chat"|"text", n, includeUsage, continuousUsage, logprobs, body}.

const FINISH = ["stop", "length", "tool_calls"];
const isObject = (v) => v !== null && typeof v === "object" && !Array.isArray(v);
const has = (o, key) => Object.prototype.hasOwnProperty.call(o, key);

// ---- the bytes of a stream ---------------------------------------------------------------------------------------

// {lines, frames: [{data}|{comment}], chunks: parsed JSON of data frames but [DONE], text, ...}; never throws.
export function parseStream(bytes, asked, status = 200, headers = new Headers()) {
  const s = { bytes: Buffer.from(bytes), asked, status, headers, frames: [], chunks: [], odd: [], broken: false };
  try {
    s.text = new TextDecoder("utf-8", { fatal: true }).decode(s.bytes);
  } catch {
    s.broken = true;
    s.text = s.bytes.toString("utf8");
  }
  for (const line of s.text.split("\n")) {
    if (line.startsWith("data: ")) s.frames.push({ data: line.slice(6) });
    else if (line.startsWith(":")) s.frames.push({ comment: line.slice(1) });
    else if (line !== "") s.odd.push(line);
  }
  for (const f of s.frames) {
    if (f.data === undefined || f.data === "[DONE]") continue;
    try {
      f.json = JSON.parse(f.data);
    } catch {
      f.json = undefined;
    }
    if (isObject(f.json)) s.chunks.push(f.json);
    else s.odd.push(f.data);
  }
  s.data = s.frames.filter((f) => f.data !== undefined);
  s.parts = s.chunks.filter((c) => !has(c, "error"));
  s.choices = s.parts.flatMap((c) => (Array.isArray(c.choices) ? c.choices.filter(isObject) : []));
  s.errors = s.chunks.filter((c) => has(c, "error"));
  return s;
}

const byIndex = (s) => {
  const all = new Map();
  for (const c of s.choices) all.set(c.index, [...(all.get(c.index) ?? []), c]);
  return all;
};
const deltasOf = (list) => list.map((c) => (isObject(c.delta) ? c.delta : {}));
const callsOf = (list) => deltasOf(list).flatMap((d) => (Array.isArray(d.tool_calls) ? d.tool_calls : []));
const finishOf = (list) => list.filter((c) => c.finish_reason !== null && c.finish_reason !== undefined);

// The first complaint of f over the choices, each with its index.
function eachIndex(s, f) {
  for (const [index, list] of byIndex(s)) {
    const bad = f(list, index);
    if (bad) return `choice ${index}: ${bad}`;
  }
  return undefined;
}

function badUsage(u) {
  if (!isObject(u)) return `usage is ${JSON.stringify(u)}`;
  const n = [u.prompt_tokens, u.completion_tokens, u.total_tokens];
  n.push(u.prompt_tokens_details?.cached_tokens, u.completion_tokens_details?.reasoning_tokens);
  if (!n.every((v) => Number.isInteger(v) && v >= 0)) return `a count is missing in ${JSON.stringify(u)}`;
  if (n[0] + n[1] !== n[2]) return `total_tokens is not the sum in ${JSON.stringify(u)}`;
  if (n[3] > n[0] || n[4] > n[1]) return `a detail is larger than its whole in ${JSON.stringify(u)}`;
  return undefined;
}

export function badError(e) {
  if (!isObject(e)) return `error is ${JSON.stringify(e)}`;
  const keys = Object.keys(e).sort().join();
  if (keys !== "code,message,param,type") return `error has the keys ${keys}`;
  if (typeof e.message !== "string" || e.message === "") return "no message";
  if (typeof e.type !== "string") return "type is not a string";
  for (const key of ["param", "code"])
    if (e[key] !== null && typeof e[key] !== "string") return `${key} is neither string nor null`;
  return undefined;
}

function badLogprobs(items) {
  for (const t of items) {
    if (typeof t.token !== "string" || typeof t.logprob !== "number") return "token or logprob is missing";
    if (!Array.isArray(t.bytes) || !t.bytes.every((b) => Number.isInteger(b) && b >= 0 && b < 256)) return "no bytes";
    if (!Array.isArray(t.top_logprobs)) return "no top_logprobs";
    const bad = badLogprobs(t.top_logprobs.map((x) => ({ ...x, top_logprobs: [] })));
    if (bad) return `top_logprobs: ${bad}`;
  }
  return undefined;
}

// ---- streams -----------------------------------------------------------------------------------------------------

export const STREAM_RULES = [
  {
    name: "headers",
    from: "proxies that buffer, and clients that look at the type; the id is what a bug report needs",
    check: (s) => {
      if (s.status !== 200) return `status ${s.status}`;
      const want = [
        ["content-type", "text/event-stream; charset=utf-8"],
        ["cache-control", "no-cache"],
        ["x-accel-buffering", "no"],
      ];
      for (const [name, value] of want)
        if (s.headers.get(name) !== value) return `${name} is ${s.headers.get(name)}`;
      return s.headers.get("x-request-id") ? undefined : "no x-request-id";
    },
  },
  {
    name: "framing",
    from: "CRLF, no space after data:, a space before the newline, event: lines, several data lines: all tolerated by " +
      "the five clients, none by every client; one JSON is never split over two events",
    check: (s) => {
      if (s.odd.length) return `a line that is neither data: JSON nor a comment: ${JSON.stringify(s.odd[0])}`;
      if (/[ \r]\n/.test(s.text)) return "a blank or CR before a newline";
      if (!s.text.endsWith("\n\n")) return "the last event is not closed by a blank line";
      const events = s.text.split("\n\n").slice(0, -1);
      const many = events.find((e) => e.includes("\n"));
      if (many !== undefined) return `two lines in one event: ${JSON.stringify(many.slice(0, 80))}`;
      return events.includes("") ? "blank lines between events" : undefined;
    },
  },
  {
    name: "whole characters",
    from: "half a character in a delta, U+FFFD where the bytes were fine, lone surrogates in the JSON",
    check: (s) => {
      if (s.broken) return "the bytes are not UTF-8";
      for (const c of s.choices) {
        const d = isObject(c.delta) ? c.delta : { content: c.text };
        for (const t of [d.content, d.reasoning_content, ...callsOf([c]).map((k) => k.function?.arguments)])
          if (typeof t === "string" && /[\ud800-\udfff]/u.test(t)) return `half of a surrogate pair in ${t}`;
      }
      return undefined;
    },
  },
  {
    name: "comments",
    from: ": ping when silent is fine for all five clients; anything longer is not needed",
    check: (s) => {
      const odd = s.frames.find((f) => f.comment !== undefined && f.comment !== " ping");
      return odd && `comment ${JSON.stringify(odd.comment)}`;
    },
  },
  {
    name: "done",
    from: "no [DONE]; [DONE] twice; something after it",
    check: (s) => {
      const n = s.data.filter((f) => f.data === "[DONE]").length;
      if (n !== 1) return `${n} times [DONE]`;
      return s.frames[s.frames.length - 1].data === "[DONE]" ? undefined : "[DONE] is not the last event";
    },
  },
  {
    name: "chunk keys",
    from: "a chunk without choices: .stream() throws, both AI SDK providers report an error",
    check: (s) => {
      const object = s.asked.kind === "chat" ? "chat.completion.chunk" : "text_completion";
      for (const c of s.parts) {
        if (!Array.isArray(c.choices)) return "no choices list";
        if (c.object !== object) return `object is ${c.object}`;
        if (typeof c.id !== "string" || !c.id || typeof c.model !== "string") return "id or model is not a string";
        if (!Number.isInteger(c.created) || c.created < 1e9) return `created is ${c.created}`;
      }
      return undefined;
    },
  },
  {
    name: "one identity",
    from: "id, created or model changing between the chunks of one answer",
    check: (s) => {
      const ids = new Set(s.parts.map((c) => JSON.stringify([c.id, c.created, c.model])));
      return ids.size > 1 ? `${ids.size} of them` : undefined;
    },
  },
  {
    name: "choice keys",
    from: "finish_reason missing on middle chunks; logprobs missing; a delta that is null",
    check: (s) => {
      for (const c of s.choices) {
        if (!Number.isInteger(c.index) || c.index < 0 || c.index >= s.asked.n) return `index is ${c.index}`;
        if (!has(c, "finish_reason")) return "no finish_reason";
        if (!has(c, "logprobs")) return "no logprobs";
        if (s.asked.kind === "chat" ? !isObject(c.delta) : typeof c.text !== "string") return "no delta or text";
      }
      return undefined;
    },
  },
  {
    name: "every choice",
    from: "n choices were asked for",
    check: (s) =>
      byIndex(s).size === s.asked.n || s.errors.length ? undefined : `${byIndex(s).size} of ${s.asked.n} choices came`,
  },
  {
    name: "role first",
    from: "no role in any delta: .stream() throws, LangChain loses tool calls; first delta without content: " +
      "agents behind LiteLLM fail; a role other than assistant fails the AI SDK's schema",
    check: (s) =>
      s.asked.kind !== "chat"
        ? undefined
        : eachIndex(s, (list) => {
            const d = deltasOf(list);
            if (d[0].role !== "assistant") return "the first delta has no role";
            if (d[0].content !== "") return `the first delta's content is ${JSON.stringify(d[0].content)}`;
            return d.slice(1).some((x) => has(x, "role")) ? "a role later" : undefined;
          }),
  },
  {
    name: "text is text",
    from: "content null or absent in text deltas",
    check: (s) =>
      s.asked.kind !== "chat"
        ? undefined
        : eachIndex(s, (list) => {
            for (const c of list) {
              const d = isObject(c.delta) ? c.delta : {};
              const last = c.finish_reason !== null;
              if (has(d, "content") && typeof d.content !== "string") return "content is not a string";
              if (!has(d, "content") && !has(d, "tool_calls") && !last) return "a delta with neither content nor calls";
            }
            return undefined;
          }),
  },
  {
    name: "one finish",
    from: "no finish_reason: .stream() throws, the AI SDK reports an error; twice: LangChain reads \"stopstop\"",
    check: (s) =>
      s.errors.length
        ? undefined
        : eachIndex(s, (list) => {
            const n = finishOf(list).length;
            if (n !== 1) return `${n} finish chunks`;
            if (list[list.length - 1].finish_reason === null) return "something after the finish chunk";
            const d = list[list.length - 1].delta;
            return d && Object.keys(d).length ? `the finish delta has ${Object.keys(d)}` : undefined;
          }),
  },
  {
    name: "finish words",
    from: "recover_stop, abort and other words outside the enumeration",
    check: (s) => {
      const odd = finishOf(s.choices).find((c) => !FINISH.includes(c.finish_reason));
      return odd && `finish_reason ${odd.finish_reason}`;
    },
  },
  {
    name: "usage when asked",
    from: "a usage chunk nobody asked for kills choices[0] readers; one without choices is \"not iterable\"; usage on a " +
      "content chunk moves that chunk to the end in one client",
    check: (s) => {
      const { includeUsage, continuousUsage } = s.asked;
      const last = s.parts[s.parts.length - 1];
      const bare = s.parts.filter((c) => Array.isArray(c.choices) && c.choices.length === 0);
      if (bare.length !== (includeUsage && !s.errors.length ? 1 : 0)) return `${bare.length} chunks without choices`;
      if (bare.length && bare[0] !== last) return "the usage chunk is not the last";
      for (const c of s.parts) {
        if (c === bare[0] || continuousUsage) {
          const bad = badUsage(c.usage);
          if (bad) return bad;
        } else if (includeUsage ? c.usage !== null || !has(c, "usage") : has(c, "usage")) {
          return `usage is ${JSON.stringify(c.usage)} in a chunk`;
        }
      }
      return undefined;
    },
  },
  {
    name: "usage grows",
    from: "continuous_usage_stats: counts never fall and the last chunk has the whole",
    check: (s) => {
      if (!s.asked.continuousUsage) return undefined;
      const n = s.parts.map((c) => c.usage?.completion_tokens);
      const at = n.findIndex((v, i) => i > 0 && v < n[i - 1]);
      return at >= 0 ? `${n[at]} after ${n[at - 1]}` : undefined;
    },
  },
  {
    name: "reasoning under both names",
    from: "readers of reasoning_content get nothing from reasoning, and the other way round, without any error",
    check: (s) => {
      const odd = deltasOf(s.choices).find((d) => d.reasoning_content !== d.reasoning);
      if (odd) return `${JSON.stringify(odd.reasoning_content)} and ${JSON.stringify(odd.reasoning)}`;
      const empty = deltasOf(s.choices).find((d) => has(d, "reasoning") && (typeof d.reasoning !== "string" || !d.reasoning));
      return empty && `reasoning is ${JSON.stringify(empty.reasoning)}`;
    },
  },
  {
    name: "calls counted from 0",
    from: "no index: the call is lost in .stream(), an error in the AI SDK, invalid in LangChain; first index 1: throws",
    check: (s) =>
      eachIndex(s, (list) => {
        let open = -1;
        for (const k of callsOf(list)) {
          if (!Number.isInteger(k.index)) return `index is ${JSON.stringify(k.index)}`;
          if (k.index !== open && k.index !== open + 1) return `call ${k.index} after call ${open}`;
          open = k.index;
        }
        return undefined;
      }),
  },
  {
    name: "a call opens whole",
    from: "first delta without type: .stream() throws; without id: LangChain's call is invalid; arguments null or absent",
    check: (s) => {
      const ids = new Set();
      return eachIndex(s, (list) => {
        let open = -1;
        for (const k of callsOf(list)) {
          if (k.index === open) continue;
          open = k.index;
          if (typeof k.id !== "string" || !k.id || ids.has(k.id)) return `the id is ${JSON.stringify(k.id)}`;
          ids.add(k.id);
          if (k.type !== "function") return `the type is ${JSON.stringify(k.type)}`;
          if (typeof k.function?.name !== "string" || !k.function.name) return "no name";
          if (k.function.arguments !== "") return `the first arguments are ${JSON.stringify(k.function.arguments)}`;
        }
        return undefined;
      });
    },
  },
  {
    name: "a call goes on with arguments only",
    from: "a repeated or changed name, id \"\" or null later",
    check: (s) =>
      eachIndex(s, (list) => {
        let open = -1;
        for (const k of callsOf(list)) {
          const keys = Object.keys(k).sort().join();
          if (k.index !== open) open = k.index;
          else if (keys !== "function,index" || Object.keys(k.function ?? {}).join() !== "arguments")
            return `a later delta has ${keys} with ${Object.keys(k.function ?? {})}`;
        }
        return undefined;
      }),
  },
  {
    name: "arguments are text",
    from: "an object as arguments becomes [object Object]; the pieces together must be JSON",
    check: (s) =>
      eachIndex(s, (list) => {
        const whole = new Map();
        for (const k of callsOf(list)) {
          if (typeof k.function?.arguments !== "string") return `arguments are ${JSON.stringify(k.function?.arguments)}`;
          whole.set(k.index, (whole.get(k.index) ?? "") + k.function.arguments);
        }
        for (const text of whole.values()) {
          try {
            if (!isObject(JSON.parse(text))) return `the arguments are ${text}`;
          } catch {
            return `the arguments are ${text}`;
          }
        }
        return undefined;
      }),
  },
  {
    name: "no empty list of calls",
    from: "tool_calls [] or null in a delta",
    check: (s) => {
      const odd = deltasOf(s.choices).find((d) => has(d, "tool_calls") && !d.tool_calls?.length);
      return odd && `tool_calls is ${JSON.stringify(odd.tool_calls)}`;
    },
  },
  {
    name: "calls finish with tool_calls",
    from: "finish_reason stop after calls ends an agent's loop; tool_calls without calls hangs it",
    check: (s) =>
      eachIndex(s, (list) => {
        const n = callsOf(list).length;
        const reason = finishOf(list)[0]?.finish_reason;
        if (n && reason === "stop") return "stop after calls";
        return !n && reason === "tool_calls" ? "tool_calls without a call" : undefined;
      }),
  },
  {
    name: "errors are objects",
    from: "a flat error in a stream is a silent truncation; an error not followed by [DONE] and the end hangs",
    check: (s) => {
      const flat = s.chunks.find((c) => c.object === "error" || has(c, "detail"));
      if (flat) return `a flat error ${JSON.stringify(flat)}`;
      if (s.errors.length > 1) return `${s.errors.length} errors`;
      if (!s.errors.length) return undefined;
      if (s.chunks[s.chunks.length - 1] !== s.errors[0]) return "chunks after the error";
      if (Object.keys(s.errors[0]).join() !== "error") return "more keys beside error";
      return badError(s.errors[0].error);
    },
  },
  {
    name: "logprobs",
    from: "bytes wrong or missing: a character over several tokens cannot be put together",
    check: (s) => {
      for (const c of s.choices) {
        if (!s.asked.logprobs && c.logprobs !== null) return "logprobs that were not asked for";
        if (!c.logprobs) continue;
        const l = c.logprobs;
        const bad =
          s.asked.kind === "chat"
            ? badLogprobs(l.content)
            : [l.tokens, l.token_logprobs, l.top_logprobs, l.text_offset].every((x) => x?.length === l.tokens.length)
              ? undefined
              : "the four lists differ in length";
        if (bad) return bad;
      }
      return undefined;
    },
  },
];

export const checkStream = (s) => complaints(STREAM_RULES, s);

function complaints(rules, what) {
  return rules.flatMap((rule) => {
    let bad;
    try {
      bad = rule.check(what);
    } catch (e) {
      bad = `cannot be read: ${e.message}`;
    }
    return bad ? [{ rule: rule.name, text: bad }] : [];
  });
}

// ---- whole answers -----------------------------------------------------------------------------------------------

export const BODY_RULES = [
  {
    name: "json type",
    from: "clients choose the parser by the type",
    check: (a) => {
      if (a.headers.get("content-type") !== "application/json") return `content-type ${a.headers.get("content-type")}`;
      return a.headers.get("x-request-id") ? undefined : "no x-request-id";
    },
  },
  {
    name: "answer keys",
    from: "required keys of the published schema, null where empty",
    check: (a) => {
      const object = a.asked.kind === "chat" ? "chat.completion" : "text_completion";
      if (a.json.object !== object || !a.json.id || !Number.isInteger(a.json.created)) return "object, id or created";
      if (typeof a.json.model !== "string") return "model";
      if (a.json.choices.length !== a.asked.n) return `${a.json.choices.length} choices`;
      for (const [i, c] of a.json.choices.entries()) {
        if (c.index !== i || !FINISH.includes(c.finish_reason) || !has(c, "logprobs")) return `choice ${i}`;
        if (a.asked.kind === "text") {
          if (typeof c.text !== "string") return `text ${i}`;
        } else {
          const m = c.message;
          if (m.role !== "assistant" || !has(m, "content") || m.refusal !== null) return `message ${i}`;
          if (m.reasoning !== m.reasoning_content) return `reasoning of ${i}`;
        }
      }
      return undefined;
    },
  },
  { name: "answer usage", from: "usage with both details on every whole answer", check: (a) => badUsage(a.json.usage) },
  {
    name: "answer calls",
    from: "ids, types, arguments as text, the finish reason, no empty list",
    check: (a) => {
      if (a.asked.kind !== "chat") return undefined;
      for (const c of a.json.choices) {
        const calls = c.message.tool_calls;
        if (calls === null && c.finish_reason === "tool_calls") return "tool_calls without a call";
        if (calls === null) continue;
        if (!calls.length) return "an empty list of calls";
        if (c.finish_reason === "stop") return "stop after calls";
        if (new Set(calls.map((k) => k.id)).size !== calls.length) return "ids repeat";
        for (const k of calls) {
          if (!k.id || k.type !== "function" || !k.function.name) return "id, type or name";
          if (typeof k.function.arguments !== "string") return "arguments are not text";
          JSON.parse(k.function.arguments);
        }
      }
      return undefined;
    },
  },
  {
    name: "answer logprobs",
    from: "as in streams",
    check: (a) => {
      for (const c of a.json.choices) {
        if (!a.asked.logprobs !== (c.logprobs === null)) return "logprobs when not asked for, or none when asked";
        if (c.logprobs && a.asked.kind === "chat") return badLogprobs(c.logprobs.content);
      }
      return undefined;
    },
  },
];

export const checkBody = (a) => complaints(BODY_RULES, a);

export const ERROR_RULES = [
  {
    name: "a real status",
    from: "FastDeploy sends 304 as an error, which a client reads as success without a body",
    check: (a) => (a.status >= 400 && a.status < 600 ? undefined : `status ${a.status}`),
  },
  {
    name: "an error object",
    from: "{\"detail\"} and flat errors: the message is lost, \"429 status code (no body)\"",
    check: (a) => {
      if (a.headers.get("content-type") !== "application/json") return `content-type ${a.headers.get("content-type")}`;
      if (!isObject(a.json) || Object.keys(a.json).join() !== "error") return `the body is ${a.text}`;
      return badError(a.json.error);
    },
  },
  {
    name: "an id",
    from: "SDKs show x-request-id in their errors",
    check: (a) => (a.headers.get("x-request-id") ? undefined : "no x-request-id"),
  },
  {
    name: "when to come back",
    from: "SDKs obey retry-after-ms and Retry-After on 429 and 503",
    check: (a) => {
      if (a.status !== 429 && a.status !== 503) return undefined;
      const ms = Number(a.headers.get("retry-after-ms"));
      return Number(a.headers.get("retry-after")) >= 1 && ms >= 100 && ms <= 60000 ? undefined : "no time is given";
    },
  },
];

export const checkError = (a) => complaints(ERROR_RULES, a);
