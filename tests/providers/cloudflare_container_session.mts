// providers/cloudflare-container/src/session_object.ts on a clock that is set, run by test_cloudflare_container_session.py.
//
// node --experimental-strip-types --test cloudflare_container_session.mts, in a directory that has the folder's src/ and node_modules/.
// The platform is a double with what the object uses of it: anything else is not a function. What its first process
// answers, a test says.

import assert from "node:assert/strict";
import { registerHooks } from "node:module";
import { join } from "node:path";
import { mock, test } from "node:test";
import { pathToFileURL } from "node:url";

const BASE = "export class DurableObject { constructor(ctx, env) { Object.assign(this, { ctx, env }); } };\nexport { DurableObject as WorkerEntrypoint };";
registerHooks({
  resolve: (name, context, next) =>
    name === "cloudflare:workers"
      ? { url: `data:text/javascript,${encodeURIComponent(BASE)}`, shortCircuit: true }
      : next(name, context),
  // Node's loader wants to be told that a JSON module is one; a Worker's bundler does not.
  load: (url, context, next) =>
    next(url, url.endsWith(".json") ? { ...context, importAttributes: { type: "json" } } : context),
});
const ours = (file: string) => import(pathToFileURL(join(process.cwd(), "src", file)).href);
const { SessionObject } = await ours("session_object.ts");
const { rulesFor } = await ours("egress.ts");
const { readAll } = await ours("settings.ts");
const { Workspaces } = await ours("workspaces.ts");

const SESSION = "sesn_1";
const NEEDED = { ANTHROPIC_ENVIRONMENT_ID: "env_1", ANTHROPIC_ENVIRONMENT_KEY: "key" };

let now = 0;
mock.timers.enable({ apis: ["Date"] });

function pass(seconds: number): void {
  now += seconds * 1000;
  mock.timers.setTime(now);
}

/** One object, its storage, its container and its bucket. */
class World {
  boots = 0;
  saves = 0;
  isRunning = false;
  alarm: number | undefined;
  runners = 0;
  isFresh = true;
  isSilent = false;
  isBucketOut = false;
  /** How often the dispatcher was told that the container has ended. */
  ended = 0;
  /** What the last start brought. */
  brought = "";
  files = new Map<string, Uint8Array>();
  restoreSeconds = 0;
  baseUrl = "https://api.anthropic.com";
  onSave: () => void = () => undefined;
  keepWarmSeconds = 60;
  /** What a save is answered with. */
  saveStatus = 200;
  allowedHosts: string[] = [];
  /** What the platform was told of the network, since it was asked last. */
  told: unknown[] = [];
  readonly stored = new Map<string, unknown>();
  object: any;
  readonly #platform: [unknown, unknown];
  #ended: () => void = () => undefined;

  constructor() {
    const world = this;
    const container = {
      get running() {
        return world.isRunning;
      },
      start: ({ enableInternet }: { enableInternet: boolean }) => {
        this.boots += 1;
        this.told.push({ enableInternet });
        Object.assign(this, { isRunning: true, isFresh: true, runners: 0 });
      },
      monitor: () =>
        new Promise<void>((resolve) => {
          this.#ended = resolve;
        }),
      interceptAllOutboundHttp: async (rules: unknown) => this.told.push(["http", rules]),
      interceptOutboundHttps: async (host: string, rules: unknown) => this.told.push(["https", host, rules]),
      interceptOutboundHttp: async (host: string, rules: unknown) => this.told.push(["http", host, rules]),
      destroy: async () => {
        this.isRunning = false;
        this.#ended();
      },
      getTcpPort: () => ({ fetch: async (url: string, init: RequestInit) => this.#answer(new URL(url), init) }),
    };
    const storage = {
      kv: {
        get: (key: string) => structuredClone(this.stored.get(key)),
        put: (key: string, value: unknown) => this.stored.set(key, structuredClone(value)),
      },
      setAlarm: async (at: number) => {
        this.alarm = at;
      },
      sync: async () => undefined,
    };
    const bucket = {
      get: async () => this.#ask(null),
      put: async () => this.#ask({ size: 1 }),
    };
    const ended = async () => {
      this.ended += 1;
    };
    const env = { DISPATCHER: { getByName: () => ({ ended }) }, WORKSPACES: bucket };
    const exports = { Egress: ({ props }: { props: { hosts: string[] } }) => props.hosts };
    this.#platform = [{ container, storage, exports, waitUntil: () => undefined }, env];
    this.forget();
  }

  /** The object is taken out of memory; the container goes on. */
  forget(): void {
    this.object = new SessionObject(...this.#platform);
  }

  /** As by the platform, or for want of memory. */
  die(): void {
    this.isRunning = false;
    this.#ended();
  }

  since(): unknown[] {
    return this.told.splice(0);
  }

  #ask<T>(answer: T): T {
    if (this.isBucketOut) throw new Error("we encountered an internal error (10001)");
    return answer;
  }

  async #answer(url: URL, { method, body }: RequestInit): Promise<Response> {
    if (this.isSilent) throw new Error("the container is not listening");
    switch (`${method} ${url.pathname}`) {
      case "GET /":
        return Response.json({ fresh: this.isFresh, stopping: false, runners: this.runners });
      case "PUT /workspace":
        pass(this.restoreSeconds);
        this.isFresh = false;
        return new Response("");
      case "POST /runners":
        this.brought = await (body as Blob).text();
        return new Response('{"event":"ready"}\n{"event":"ended","code":0}\n');
      case "GET /workspace":
        this.saves += 1;
        this.onSave();
        return new Response("no", { status: this.saveStatus, headers: { "x-sha256": "0".repeat(64) } });
    }
    throw new Error(`${method} ${url.pathname} is not answered here`);
  }

  start(): Promise<{ outcome: string; reason: string }> {
    const { keepWarmSeconds } = this;
    const egress = rulesFor(SESSION, this.allowedHosts, this.baseUrl);
    const options = { keepWarmSeconds, maxFilesBytes: 1 << 20, retentionSeconds: 86_400, egress };
    return this.object.start(SESSION, "{}", this.files, options);
  }

  /** So many seconds, with the alarms that are due in them. */
  async live(seconds: number): Promise<void> {
    const until = now + seconds * 1000;
    while (this.alarm !== undefined && this.alarm <= until) {
      pass(Math.max(0, this.alarm - now) / 1000);
      this.alarm = undefined;
      await this.object.alarm();
    }
    pass((until - now) / 1000);
  }
}

for (const restoreSeconds of [100, 250]) {
  test(`files that take ${restoreSeconds} s to restore are restored once, and the next hand-out is served`, async () => {
    const world = new World();
    world.restoreSeconds = restoreSeconds;
    const late = await world.start();
    assert.deepEqual([late.outcome, world.boots], ["failed", 1]);
    assert.match(late.reason, /took too long; the next hand-out finds it ready/);
    await world.live(120 + 60); // the reclaim window, and a sweep
    assert.equal((await world.start()).outcome, "ready");
    assert.equal(world.boots, 1);
  });
}

test("a container that began to answer after the start gave up is there for the next hand-out", async () => {
  const world = new World();
  world.isSilent = true;
  const starting = world.start();
  while (!world.isRunning) await new Promise((resolve) => setImmediate(resolve));
  pass(70);
  assert.match((await starting).reason, /did not answer in time/);
  world.isSilent = false;
  await world.live(120 + 60);
  assert.equal((await world.start()).outcome, "ready");
  assert.equal(world.boots, 1);
});

test("a hand-out that waited too long for a save finds the container at its next turn", async () => {
  const world = new World();
  let next: ReturnType<World["start"]> | undefined;
  const onSave = () => {
    next = world.start();
    pass(100);
  };
  Object.assign(world, { saveStatus: 413, onSave, keepWarmSeconds: 150 });
  await world.start();
  await world.object.alarm();
  assert.match((await next)?.reason ?? "", /took too long; the next hand-out finds it ready/);
  await world.live(120 + 60);
  assert.equal((await world.start()).outcome, "ready");
  assert.equal(world.boots, 1);
});

test("a container that waits for a hand-out in vain is ended", async () => {
  const world = new World();
  world.restoreSeconds = 100;
  await world.start();
  await world.live(240);
  assert.equal(world.isRunning, false);
});

test("a container that was served in is kept no longer than it is kept warm", async () => {
  const world = new World();
  world.saveStatus = 413;
  await world.start();
  await world.live(15 + world.keepWarmSeconds);
  assert.equal(world.isRunning, false);
});

for (const [status, attempts] of [
  [413, 1],
  [422, 2],
  [507, 5],
] as const) {
  test(`a save that is refused with ${status} is tried ${attempts} times`, async () => {
    const world = new World();
    world.saveStatus = status;
    await world.start();
    await world.live(600);
    assert.deepEqual([world.saves, world.isRunning], [attempts, false]);
  });
}

test("with a star among the allowed hosts the network is open, and nobody asks about it", async () => {
  const world = new World();
  world.allowedHosts = ["example.com", "*"];
  await world.start();
  assert.deepEqual(world.since(), [{ enableInternet: true }]);
});

test("without allowed hosts there is the API, and nothing else", () => {
  assert.deepEqual(rulesFor(SESSION, [], "https://api.example:8443")?.hosts, ["api.example"]);
});

test("with allowed hosts a container is held to them before it starts, and again when the object was forgotten", async () => {
  const world = new World();
  Object.assign(world, { allowedHosts: ["Example.com"], baseUrl: "https://api.example:8443", keepWarmSeconds: 3600 });
  await world.start();
  const hosts = ["example.com", "api.example"];
  const held = [
    ["http", hosts],
    ["https", "*", hosts],
    ["https", "api.example:8443", hosts],
  ];
  assert.deepEqual(world.since(), [...held, { enableInternet: false }]);
  world.forget();
  world.allowedHosts = ["other.example"]; // for containers that start later
  await world.start();
  assert.deepEqual([world.since(), world.boots], [held, 1]);
});

for (const [value, problem] of [
  ["https://example.com", /SANDBOX_ALLOWED_HOSTS is unusable: expected host names/],
  ["example.com:443", /expected host names/],
  [",", /expected host names/],
  ["*.", /expected host names/],
  ["exa*mple.com", /expected host names/],
] as const) {
  test(`${value} is no allowed host`, () => {
    assert.throws(() => readAll({ ...NEEDED, SANDBOX_ALLOWED_HOSTS: value }), { message: problem });
  });
}

test("names and names with a star in front are allowed hosts", () => {
  const settings = readAll({ ...NEEDED, SANDBOX_ALLOWED_HOSTS: "Example.com, *.b-c.example ,1.2.3.4" });
  assert.deepEqual(settings.allowedHosts, ["Example.com", "*.b-c.example", "1.2.3.4"]);
});

test("files outlast a bucket that is out for half an hour", async () => {
  const world = new World();
  await world.start();
  world.isBucketOut = true;
  await world.live(1800);
  assert.ok(world.isRunning && world.saves < 20, `${world.saves} attempts`);
  world.isBucketOut = false;
  await world.live(300 + world.keepWarmSeconds);
  assert.equal(world.isRunning, false);
  await world.start();
  assert.doesNotMatch(world.brought, /ERRORS/);
});

test("files that a bucket does not take for an hour are given up, and the agent is told once", async () => {
  const world = new World();
  await world.start();
  world.isBucketOut = true;
  await world.live(3600 + 300 + world.keepWarmSeconds);
  assert.equal(world.isRunning, false);
  assert.match((await world.start()).reason, /the files could not be restored/);
  world.isBucketOut = false;
  await world.start();
  assert.match(world.brought, /inputs\/ERRORS.txt.*\nfiles: your files could not be saved: the bucket did not take them;/);
  await world.start();
  assert.doesNotMatch(world.brought, /ERRORS/);
});

test("a session is not started without its files, but once the bucket gives them", async () => {
  const world = new World();
  world.isBucketOut = true;
  assert.match((await world.start()).reason, /the files could not be restored/);
  assert.deepEqual([world.isRunning, world.brought], [false, ""]);
  world.isBucketOut = false;
  assert.equal((await world.start()).outcome, "ready");
});

test("nobody waits for a bucket that does not answer", async () => {
  const never = () => new Promise<never>(() => undefined);
  const workspaces = new Workspaces({ get: never, put: never, delete: never }, 10, 10);
  const archive = new Response("no", { headers: { "x-sha256": "0".repeat(64) } });
  await assert.rejects(workspaces.open(SESSION), /did not answer within/);
  await assert.rejects(workspaces.save(SESSION, archive), /did not answer within/);
  await assert.rejects(workspaces.delete(SESSION), /did not answer within/);
});

test("what is too large to be saved is missed in the next container, whose agent is told so beside what else it was not brought", async () => {
  const world = new World();
  world.saveStatus = 413;
  await world.start();
  await world.start(); // in the same container, nothing is missed yet
  assert.doesNotMatch(world.brought, /ERRORS/);
  await world.live(600);
  world.files.set("inputs/ERRORS.txt", new TextEncoder().encode("a.txt: not found\n"));
  await world.start();
  assert.match(world.brought, /a\.txt: not found\nfiles: your files could not be saved: no;/);
});

test("a container that hangs while a runner works is borne with, then ended, and the agent is told", async () => {
  const world = new World();
  await world.start();
  Object.assign(world, { runners: 1, isSilent: true });
  await world.live(200);
  world.isSilent = false;
  await world.live(200);
  assert.deepEqual([world.isRunning, world.ended], [true, 0], "it was only busy");
  world.isSilent = true;
  assert.match((await world.start()).reason, /does not answer/);
  await world.live(400);
  assert.deepEqual([world.isRunning, world.ended], [false, 1]);
  world.isSilent = false;
  assert.equal((await world.start()).outcome, "ready");
  assert.match(world.brought, /your container stopped answering before your files were saved/);
});

test("a container that dies with files that were not saved is told of in the next", async () => {
  const world = new World();
  await world.start();
  world.runners = 1;
  world.die();
  await world.live(15);
  await world.start();
  assert.match(world.brought, /your container ended before your files were saved/);
});
