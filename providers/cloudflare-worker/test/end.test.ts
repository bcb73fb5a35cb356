/** How the runner of a session's object ends: what arrives after it, and what a mistake of ours leaves. */

import { runInDurableObject } from "cloudflare:test";
import { afterEach, expect, it, vi } from "vitest";
import type { Job } from "../_shared/jobs.ts";
import { Runner } from "../_shared/runner.ts";
import type { SessionObject } from "../src/session_object.ts";
import { State } from "../src/state.ts";
import { LOOK_MS, objectOf } from "./control_plane.ts";
import { MIB } from "./support.ts";

const RETENTION_SECONDS = 3600;
const TOKEN = "a-token-without-a-shape";

function jobOf(sessionId: string): Job {
  const places = { sessionId, workId: sessionId, environmentId: "env_1", baseUrl: "https://api.example" };
  return { ...places, token: TOKEN, isItemToken: true, maxIdleSeconds: 0.1, maxWaitSeconds: 1 };
}

/** The object of a session whose runner lost its memory `agoMs` after its last heartbeat, of a lease of one second. */
function interrupted(id: string, agoMs: number, work: (object: SessionObject, state: State) => Promise<void>) {
  return runInDurableObject(objectOf(id), async (object, { storage }) => {
    const state = new State(storage);
    state.create();
    const launch = { maxFilesBytes: MIB, retentionSeconds: RETENTION_SECONDS, areSkillsBrought: false };
    state.begin({ ...launch, job: jobOf(id) });
    const beatenAt = Date.now() - agoMs;
    state.saveLease({ lastHeartbeat: "2026-01-01T00:00:00Z", ttlSeconds: 1, beatenAt, unknownSince: null });
    await work(object, state);
    const alarm = await storage.getAlarm();
    expect(((alarm ?? 0) - Date.now()) / 1000, "the files stay").toBeGreaterThan(RETENTION_SECONDS / 2);
  });
}

afterEach(() => {
  vi.restoreAllMocks();
});

it.each(["a heartbeat that was recorded", "a heartbeat that was refused"])(
  "outlives %s, told too late",
  async (what) => {
    let answer = (_: Response): void => undefined;
    const beat = new Promise<Response>((resolve) => {
      answer = resolve;
    });
    vi.spyOn(globalThis, "fetch").mockImplementation((input) =>
      String(input).includes("/heartbeat") ? beat : Promise.resolve(Response.json({}, { status: 403 })),
    );
    await interrupted(what.replaceAll(" ", "-"), 600, async (object, state) => {
      const alarm = object.alarm();
      while (state.launch() !== undefined) await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
      const heartbeat = {
        last_heartbeat: "2026-01-01T00:00:01Z",
        lease_extended: true,
        state: "active",
        ttl_seconds: 300,
      };
      answer(what.includes("refused") ? Response.json({}, { status: 412 }) : Response.json(heartbeat));
      await alarm;
      expect(state.lease()).toBeUndefined();
    });
  },
);

it("tries no more than three times after a mistake of ours, and shows no token", async () => {
  const run = vi.spyOn(Runner.prototype, "run").mockRejectedValue(new TypeError(`no ${TOKEN} here`));
  const told = vi.spyOn(console, "error").mockImplementation(() => undefined);
  await interrupted("crashing", 0, async (object, state) => {
    while (state.launch() !== undefined) await object.alarm();
  });
  expect(run).toHaveBeenCalledTimes(3);
  expect(told).toHaveBeenCalledTimes(3);
  expect(JSON.stringify(told.mock.calls)).not.toContain(TOKEN);
});
