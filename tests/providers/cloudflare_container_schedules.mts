// Seeded fault schedules for src/session_object.ts of providers/cloudflare-container, run by test_cloudflare_container_session.py.
//
// node --experimental-strip-types --test cloudflare_container_schedules.mts, in a directory that has the folder's src/ and node_modules/.
// Messages, evictions and troubles come in an order that a seed says, on a clock that is set: hours take milliseconds, and
// a seed does the same every time. PROVIDER_SCHEDULES_N plays more seeds, PROVIDER_SCHEDULES_SEED begins elsewhere. The platform,
// the container and the bucket are doubles that refuse what the real ones refuse. What is asked of every schedule:
//
// - a runner is started only in a container that has its files, and a second container never while there is one;
// - an agent whose files are older than what was written last is told so, in the first start that it could be;
// - a start comes to an end, and fails with an error that somebody has mapped;
// - once the troubles are over the next message is served, the container is ended, the files are in the bucket; and after
//   the time that they are kept nothing is left.

import assert from "node:assert/strict";
import { registerHooks } from "node:module";
import { join } from "node:path";
import { mock, test } from "node:test";
import { pathToFileURL } from "node:url";

const BASE =
  "export class DurableObject { constructor(ctx, env) { Object.assign(this, { ctx, env }); } };\nexport { DurableObject as WorkerEntrypoint };";
registerHooks({
  resolve: (name, context, next) =>
    name === "cloudflare:workers"
      ? { url: `data:text/javascript,${encodeURIComponent(BASE)}`, shortCircuit: true }
      : next(name, context),
});
class FixedLengthStream extends TransformStream {
  constructor(_: number) {
    super();
  }
}
Object.assign(globalThis, { FixedLengthStream });
const { SessionObject } = await import(pathToFileURL(join(process.cwd(), "src/session_object.ts")).href);

const SESSION = "sesn_1";
const RETENTION_SECONDS = 86_400;
const STEPS = 14;
const LINGER_SECONDS = 150;
const FIRST = Number(process.env["PROVIDER_SCHEDULES_SEED"] ?? 0);
const SEEDS = Number(process.env["PROVIDER_SCHEDULES_N"] ?? 200);

mock.timers.enable({ apis: ["Date"] });
const realTimeout = globalThis.setTimeout;
const noPause = (done: () => void, ms: number) => (ms < 1000 ? setImmediate(done) : realTimeout(done, ms));
Object.assign(globalThis, { setTimeout: noPause }); // between two looks at a container that boots

type Chance = () => number;

/** Mulberry32: the same numbers for the same seed. */
function chanceOf(seed: number): Chance {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** One session's object, its storage, its container and its bucket. */
class World {
  readonly story: string[] = [];
  /** What was asked of the container that must never be: an error there would only look like a failed start. */
  readonly wrongs: string[] = [];
  readonly keepWarmSeconds: number;
  isRunning = false;
  isSilent = false;
  isBucketOut = false;
  restoreSeconds = 0;
  saveStatus = 200;
  /** Which message's work was the last that was written at all, is in the container, and is in the bucket. */
  written = 0;
  inContainer = 0;
  inBucket: number | undefined;
  #isFresh = true;
  #isStopping = false;
  #runnerUntil: number | undefined;
  #dieAt: number | undefined;
  #ended: (() => void)[] = [];
  #streams: ReadableStreamDefaultController<Uint8Array>[] = [];
  #object: any;
  readonly #chance: Chance;
  readonly #stored = new Map<string, unknown>();
  #alarm: number | undefined;

  constructor(chance: Chance) {
    this.#chance = chance;
    this.keepWarmSeconds = [0, 60, 1200][Math.floor(chance() * 3)] as number;
    this.forget();
  }

  get isEmpty(): boolean {
    return this.#stored.size === 0 && this.inBucket === undefined && !this.isRunning;
  }

  /** The object is taken out of memory, and a new one goes on with what is stored. */
  forget(): void {
    this.#closeStreams();
    const world = this;
    const container = {
      get running() {
        return world.isRunning;
      },
      start: () => this.#boot(),
      monitor: () => new Promise<void>((resolve) => this.#ended.push(resolve)),
      destroy: async () => this.die(),
      getTcpPort: () => ({ fetch: (url: string, init: RequestInit) => this.#answer(new URL(url), init) }),
    };
    const storage = {
      kv: {
        get: (key: string) => structuredClone(this.#stored.get(key)),
        put: (key: string, value: unknown) => this.#stored.set(key, structuredClone(value)),
      },
      setAlarm: async (at: number) => {
        this.#alarm = at;
      },
      deleteAll: async () => {
        this.#stored.clear();
        this.#alarm = undefined;
      },
      sync: async () => undefined,
    };
    const saved = () => ({ body: new Blob(["x"]).stream(), size: 1, checksums: { sha256: new ArrayBuffer(32) } });
    const bucket = {
      get: async () => this.#ask(() => (this.inBucket === undefined ? null : saved())),
      put: async () => this.#ask(() => ({ size: (this.inBucket = this.inContainer) })),
      delete: async () => this.#ask(() => void (this.inBucket = undefined)),
    };
    const env = { DISPATCHER: { getByName: () => ({ ended: async () => undefined }) }, WORKSPACES: bucket };
    this.#object = new SessionObject({ container, storage, exports: {}, waitUntil: () => undefined }, env);
  }

  die(): void {
    this.isRunning = false;
    this.#runnerUntil = this.#dieAt = undefined;
    this.#closeStreams();
    for (const ended of this.#ended.splice(0)) ended();
  }

  /** The first process is told to end: it waits a while for its files to be saved. */
  sigterm(): void {
    if (!this.isRunning) return;
    this.#isStopping = true;
    this.#dieAt = Date.now() + LINGER_SECONDS * 1000;
    if (this.#runnerUntil !== undefined) this.#runnerUntil = Date.now();
  }

  async start(): Promise<{ outcome: string; reason: string }> {
    const { keepWarmSeconds } = this;
    const options = { keepWarmSeconds, maxFilesBytes: 1 << 20, retentionSeconds: RETENTION_SECONDS, egress: undefined };
    const started = await this.#object.start(SESSION, "{}", new Map(), options);
    this.story.push(`  ${started.outcome} ${started.reason}`);
    return started;
  }

  /** So many seconds, with whatever is due in them. */
  async live(seconds: number): Promise<void> {
    const until = Date.now() + seconds * 1000;
    for (;;) {
      const due = [this.#alarm, this.#runnerUntil, this.#dieAt].filter((at) => at !== undefined && at <= until);
      if (due.length === 0) break;
      const next = Math.max(Date.now(), Math.min(...(due as number[])));
      mock.timers.setTime(next);
      if (this.#runnerUntil !== undefined && this.#runnerUntil <= next) {
        this.#runnerUntil = undefined;
        this.#closeStreams();
      }
      if (this.#dieAt !== undefined && this.#dieAt <= next) this.die();
      if (this.#alarm !== undefined && this.#alarm <= next) {
        this.#alarm = undefined;
        await this.#object.alarm().catch((error: Error) => {
          if (!this.isBucketOut) throw error; // what the platform would run again
        });
      }
      await new Promise((resolve) => setImmediate(resolve)); // who listened to a stream or waited for an end goes on
      assert.ok(this.#alarm !== undefined || this.#stored.size === 0, "nothing would wake the object");
    }
    mock.timers.setTime(Math.max(Date.now(), until));
  }

  #boot(): void {
    this.#must(!this.isRunning, "a container was started beside another");
    Object.assign(this, { isRunning: true, inContainer: 0 });
    this.#isFresh = true;
    this.#isStopping = false;
  }

  #must(holds: boolean, wrong: string): void {
    if (!holds) this.wrongs.push(`${Date.now() / 1000} s: ${wrong}`);
  }

  #ask<T>(answer: () => T): T {
    if (this.isBucketOut) throw new Error("we encountered an internal error (10001)");
    return answer();
  }

  async #answer(url: URL, { method, body }: RequestInit): Promise<Response> {
    if (!this.isRunning) throw new Error("the container is not running");
    if (this.isSilent) {
      mock.timers.setTime(Date.now() + 30_000);
      throw new Error("the container is not listening");
    }
    const runners = this.#runnerUntil === undefined ? 0 : 1;
    switch (`${method} ${url.pathname}`) {
      case "GET /":
        return Response.json({ fresh: this.#isFresh, stopping: this.#isStopping, runners });
      case "PUT /workspace":
        this.#must(this.#isFresh, "files were restored twice");
        mock.timers.setTime(Date.now() + this.restoreSeconds * 1000);
        this.#isFresh = false;
        this.inContainer = body === "" ? 0 : (this.inBucket ?? 0);
        return new Response("");
      case "POST /runners": {
        if (this.#isStopping) return new Response("the sandbox is stopping", { status: 409 });
        this.#must(!this.#isFresh, "a runner was started without the session's files");
        const brought = await (body as Blob).text();
        const isMissed = this.inContainer < this.written;
        this.#must(!isMissed || brought.includes("inputs/ERRORS.txt"), "files are missing, and nobody says so");
        this.inContainer = ++this.written;
        this.#runnerUntil = Date.now() + this.#chance() * 120_000;
        return new Response(this.#stream('{"event":"ready"}\n'));
      }
      case "GET /runners":
        return new Response(this.#stream(""));
      case "GET /workspace":
        if (runners || this.#isFresh) return new Response("there is a runner", { status: 409 });
        return new Response("x", { status: this.saveStatus, headers: { "x-sha256": "0".repeat(64) } });
    }
    throw new Error(`${method} ${url.pathname} is not answered here`);
  }

  #stream(line: string): ReadableStream<Uint8Array> {
    return new ReadableStream({
      start: (controller) => {
        if (line !== "") controller.enqueue(new TextEncoder().encode(line));
        if (this.#runnerUntil === undefined) controller.close();
        else this.#streams.push(controller);
      },
    });
  }

  #closeStreams(): void {
    for (const stream of this.#streams.splice(0)) stream.close();
  }
}

const DOINGS: Record<string, (world: World, chance: Chance) => unknown> = {
  "a message": (world) => world.start(),
  "another message": (world) => world.start(),
  "time passes": (world, chance) => world.live(chance() * 60),
  "much time passes": (world, chance) => world.live(chance() * 1500),
  "the object is forgotten": (world) => world.forget(),
  "the container dies": (world) => world.die(),
  "the container is told to end": (world) => world.sigterm(),
  "the container falls silent": (world) => Object.assign(world, { isSilent: true }),
  "the container answers": (world) => Object.assign(world, { isSilent: false }),
  "the bucket is out": (world) => Object.assign(world, { isBucketOut: true }),
  "the bucket is back": (world) => Object.assign(world, { isBucketOut: false }),
  "saves are refused": (world, chance) =>
    Object.assign(world, { saveStatus: [413, 422, 507][Math.floor(chance() * 3)] }),
  "saves are taken": (world) => Object.assign(world, { saveStatus: 200 }),
  "restores are slow": (world) => Object.assign(world, { restoreSeconds: 100 }),
  "restores are fast": (world) => Object.assign(world, { restoreSeconds: 0 }),
};

async function play(world: World, chance: Chance): Promise<void> {
  const names = Object.keys(DOINGS);
  for (let step = 0; step < STEPS; step += 1) {
    const name = names[Math.floor(chance() * names.length)] as string;
    world.story.push(`${Date.now() / 1000} s: ${name}`);
    await DOINGS[name]?.(world, chance);
    await new Promise((resolve) => setImmediate(resolve));
  }
  world.story.push(`${Date.now() / 1000} s: all is well`);
  Object.assign(world, { isSilent: false, isBucketOut: false, saveStatus: 200, restoreSeconds: 0 });
  await world.live(600); // whatever it was in the middle of
  assert.equal((await world.start()).outcome, "ready");
  await world.live(3600);
  assert.deepEqual([world.isRunning, world.inBucket], [false, world.written]);
  await world.live(RETENTION_SECONDS + 3600);
  assert.ok(world.isEmpty, "something is left");
  assert.deepEqual(world.wrongs, []);
}

for (let seed = FIRST; seed < FIRST + SEEDS; seed += 1) {
  test(`schedule ${seed}`, async () => {
    mock.timers.setTime(0);
    const chance = chanceOf(seed);
    const world = new World(chance);
    try {
      await play(world, chance);
    } catch (error) {
      console.log([`run it again: PROVIDER_SCHEDULES_SEED=${seed} PROVIDER_SCHEDULES_N=1`, ...world.story].join("\n"));
      throw error;
    }
  });
}
