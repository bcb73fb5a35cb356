// The TypeScript core in a Node process of its own, driven by tests/shared/typescript_core.py: one JSON object a line, both ways.
//
// node --experimental-strip-types typescript_core.mts, in a directory that has a folder's _shared/ and node_modules/.
// What the core asks of the outside (requests, launches, the body of a webhook) it asks the tests, which answer.

import { join } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

type Values = Record<string, any>;
const asked = new Map<number, (answer: Values) => void>();
let count = 0;

function say(values: Values): void {
  process.stdout.write(`${JSON.stringify(values)}\n`);
}

function ask(what: string, values: Values): Promise<Values> {
  count += 1;
  const id = count;
  say({ ask: what, id, ...values });
  return new Promise((resolve) => asked.set(id, resolve));
}

for (const level of ["info", "warn", "error"] as const) console[level] = (line: string) => say({ log: level, line });
globalThis.fetch = async (input: any, init: any) => {
  const headers = Object.fromEntries(new Headers(init.headers));
  const answer = await ask("fetch", { url: String(input), method: init.method, headers, body: init.body ?? null });
  if (answer.failed) throw new TypeError("fetch failed");
  const hasBody = ![204, 304].includes(answer.status);
  return new Response(hasBody ? Buffer.from(answer.body, "base64") : null, answer as ResponseInit);
};

const here = (name: string) => import(pathToFileURL(join(process.cwd(), "_shared", name)).href);
// Node's loader wants to be told that a JSON module is one; a Worker's bundler does not.
const { registerHooks } = await import("node:module");
registerHooks({
  load: (url, context, next) =>
    next(url, url.endsWith(".json") ? { ...context, importAttributes: { type: "json" } } : context),
});
const { Dispatcher } = await here("dispatcher.ts");
const { openClient } = await here("api.ts");
const { FetchRefused, LaunchFailed, WebhookRejected, SettingsError } = await here("errors.ts");
const { handle } = await here("handler.ts");
const { Healer } = await here("healing.ts");
const { jobFrom } = await here("jobs.ts");
const { Lease } = await here("lease.ts");
const { errorName, line, log, runnerLog } = await here("log.ts");
const { hide, redact } = await here("secrets.ts");
const { readSettings } = await here("settings.ts");
const { fetchPublic } = await here("fetching.ts");
const { stage } = await here("staging.ts");
const { Verifier, normaliseKey } = await here("webhook.ts");

class Live extends Set<string> {
  count(): number {
    return this.size;
  }
  retain(sessions: ReadonlySet<string>): void {
    for (const each of [...this]) if (!sessions.has(each)) this.delete(each);
  }
}

const objects = new Map<number, any>();

function provider(key: number): Values {
  return {
    name: "fake",
    async launch(job: Values, files: Map<string, Uint8Array>) {
      const brought = [...files].map(([path, content]) => [path, Buffer.from(content).toString("base64")]);
      const answer = await ask("launch", { of: key, job, files: brought });
      if (answer.failed) throw new LaunchFailed(answer.failed, { retriable: answer.retriable });
      if (answer.bug) throw Object.assign(new Error(answer.text), { name: answer.bug });
      return answer;
    },
  };
}

/** As the fetcher that a test gives, which knows a few files. */
async function fetchFile(url: string, maxBytes: number): Promise<Uint8Array> {
  const file = async () => {
    const answer = await ask("file", { url, maxBytes });
    return new Response(answer.body === null ? null : Buffer.from(answer.body, "base64"), { status: answer.status });
  };
  return fetchPublic(url, maxBytes, file);
}

const made = (of: number): any => objects.get(of);
const doing: Record<string, (given: Values) => unknown> = {
  dispatcher({ of, environ, live, ownTools, timing, stageMs }) {
    const settings = readSettings(environ);
    objects.set(
      of,
      new Dispatcher({
        settings,
        provider: provider(of),
        live: new Live(live),
        workerId: `worker-${of}`,
        ownTools: new Set(ownTools),
        stage: (job: unknown, client: unknown) => stage(job, client, fetchFile, stageMs),
        timing,
      }),
    );
  },
  wake({ of, times = 1 }) {
    for (let n = 0; n < times; n += 1) made(of).wake();
  },
  suspect: ({ of, session }) => made(of).suspect({ sessionId: session }),
  drain: ({ of }) => made(of).drain(),
  sweep: ({ of }) => made(of).sweep(),
  healer({ of, environ, ownTools }) {
    const settings = readSettings(environ);
    const client = openClient(settings.environmentKey, settings.baseUrl, { maxRetries: 2, timeout: 10_000 });
    objects.set(of, new Healer(client, settings.environmentId, new Set(ownTools)));
  },
  hint: ({ of, session }) => made(of).hint(session),
  listWork: ({ of }) => made(of).listWork(),
  heal: ({ of, list }) => made(of).heal(list),
  normaliseKey: ({ key }) => normaliseKey(key),
  verifier: ({ of, keys }) => void objects.set(of, new Verifier(keys)),
  verify: ({ of, body, headers }) => made(of).verify(Buffer.from(body, "base64"), new Headers(headers)),
  async handle({ of, method, headers, body }) {
    const woken: Values[] = [];
    const suspects: Values[] = [];
    const stream = new ReadableStream(
      {
        async pull(controller) {
          const { chunk } = await ask("chunk", { of: body });
          if (chunk === null) controller.close();
          else if (chunk !== "") controller.enqueue(new Uint8Array(Buffer.from(chunk, "base64")));
          else await this.pull?.(controller);
        },
      },
      { highWaterMark: 0 },
    );
    const request = { method, headers: new Headers(headers), body: stream };
    const reply = await handle(
      request,
      made(of),
      (event: Values) => woken.push(event),
      (event: Values) => suspects.push(event),
    );
    return { status: reply.status, headers: Object.fromEntries(reply.headers), body: await reply.text(), woken, suspects };
  },
  /** What it comes to, where the internet answers `answers` one after the other. */
  async fetchPublic({ url, answers, maxBytes = 1000 }) {
    const fetcher = async (_: string, init: RequestInit): Promise<Response> => {
      const { throws, hangs, body, ...answer } = answers.shift() ?? { status: 404, body: "" };
      if (throws) throw new TypeError(throws);
      if (hangs) return new Promise((_, reject) => init.signal?.addEventListener("abort", () => reject(new Error())));
      return new Response(Buffer.from(body, "base64"), answer);
    };
    try {
      return `content ${Buffer.from(await fetchPublic(url, maxBytes, fetcher, 100))}`;
    } catch (error: any) {
      if (error instanceof FetchRefused) return error.message;
      throw error;
    }
  },
  settings: ({ environ }) => readSettings(environ),
  job: ({ item, environ }) => jobFrom(item, readSettings(environ)),
  lease({ of, item, environ }) {
    objects.set(of, new Lease(jobFrom(item, readSettings(environ)), undefined, () => undefined));
  },
  ack: ({ of }) => made(of).ack(),
  beat: ({ of }) => made(of).beat(),
  stop: ({ of }) => made(of).stop(),
  leaseEnd: ({ of }) => made(of).end,
  hide: ({ secret }) => hide(secret),
  redact: ({ text }) => redact(text),
  line: ({ action, values }) => line(action, values),
  runnerLine: ({ session, token, values }) => runnerLog(session, token)("retry", values),
};

process.on("uncaughtException", (error) => say({ log: "error", line: `uncaught ${error.stack}` }));
for await (const text of createInterface({ input: process.stdin })) {
  const given = JSON.parse(text);
  if (given.answer !== undefined) {
    asked.get(given.answer)?.(given);
    asked.delete(given.answer);
    continue;
  }
  void (async () => {
    try {
      say({ done: given.id, value: (await doing[given.do](given)) ?? null });
    } catch (error: any) {
      const known = [WebhookRejected, SettingsError].some((each) => error instanceof each);
      say({ done: given.id, failed: errorName(error), text: known ? error.message : String(error.stack ?? error) });
    }
  })();
}
