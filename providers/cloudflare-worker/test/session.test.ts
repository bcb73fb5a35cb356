/** The object of one session against a control plane: what a second start, its end and an unanswered claim do to it. */

import { env, runDurableObjectAlarm, runInDurableObject } from "cloudflare:test";
import { afterEach, describe, expect, it, vi } from "vitest";
import { ackAndClaim } from "../_shared/claim.ts";
import { EventLog } from "../_shared/events.ts";
import { Guard, LOST } from "../_shared/guard.ts";
import { Lease } from "../_shared/lease.ts";
import { State } from "../src/state.ts";
import {
  ask,
  claims,
  emulated,
  isStopped,
  LOOK_MS,
  objectOf,
  reserved,
  say,
  start,
  until,
  WRITE,
} from "./control_plane.ts";
import { MIB } from "./support.ts";

describe.skipIf(env.EMULATOR_URL === "")("a session's object", () => {
  afterEach(() => ask("DELETE", "faults"));

  it("has one runner when it is started twice, at once and later", async () => {
    const { job, id } = await reserved([{ custom: { theirs: {} } }, WRITE, "end"]);
    const outcomes = await Promise.all([start(job), start(job)]);
    expect(outcomes.sort()).toEqual(["ready", "served_already"]);
    expect(await start(job)).toBe("served_already");
    expect(await claims(id)).toBe(1);
  });

  it("keeps the token no longer than the runner, and the files no longer than it is told", async () => {
    const { job, id } = await reserved([WRITE, "end"]);
    await start(job);
    const stored = (): Promise<string> =>
      runInDurableObject(objectOf(id), (_, state) =>
        JSON.stringify(state.storage.sql.exec("SELECT * FROM state").toArray()),
      );
    expect(await stored()).toContain(job.token);
    await until(id, isStopped);
    while ((await stored()).includes("job")) await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
    expect(await stored()).not.toContain(job.token);
    const alarm = await runInDurableObject(objectOf(id), (_, state) => state.storage.getAlarm());
    expect(((alarm ?? 0) - Date.now()) / 1000).toBeGreaterThan(50);
    expect(await objectOf(id).listFiles()).toHaveLength(1);
    await runDurableObjectAlarm(objectOf(id));
    expect(await objectOf(id).listFiles(), "an alarm before its time deletes nothing").toHaveLength(1);
    await runInDurableObject(objectOf(id), (_, state) => new State(state.storage).end(Date.now()));
    await runDurableObjectAlarm(objectOf(id));
    expect(await objectOf(id).listFiles()).toBeUndefined();
  });

  it("does not wait for ever for what only somebody else can do", async () => {
    const { job, id } = await reserved([{ custom: { theirs: {} } }, "end"], { SANDBOX_MAX_WAIT_SECONDS: "0.3" });
    await start(job);
    const seen = await until(id, isStopped);
    expect(seen.events.at(-1)?.type).toBe("session.status_idle"); // the call is still theirs to answer
    expect(await claims(id)).toBe(1);
  });

  it("serves what comes while its last runner ends, at once and not with the next alarm", async () => {
    const { job, id, next } = await reserved([WRITE, "end", WRITE, "end"]);
    await runInDurableObject(objectOf(id), async (object, state) => {
      let opened = (): void => undefined;
      const gate = new Promise<void>((resolve) => {
        opened = resolve;
      });
      const setAlarm = state.storage.setAlarm.bind(state.storage);
      // The alarm of an end is far away. Whoever waits for it is between two runners.
      vi.spyOn(state.storage, "setAlarm").mockImplementation(async (at) => {
        await setAlarm(at);
        if (Number(at) - Date.now() > 40_000) await gate;
      });
      const launch = { maxFilesBytes: 64 * MIB, retentionSeconds: 60 };
      await object.start({ job, ...launch });
      await until(id, isStopped);
      await say(id, "again");
      const again = object.start({ job: await next(), ...launch });
      setTimeout(opened, 100);
      expect(await again).toBe("ready");
      await until(
        id,
        (seen) => isStopped(seen) && seen.events.filter(({ type }) => type === "user.message").length === 2,
      );
    });
    expect(await claims(id)).toBe(2);
  });

  it("does not hold a mistake of ours against a runner that got somewhere", async () => {
    const { job, id } = await reserved([WRITE, { custom: { theirs: {} } }, "end"]);
    await runInDurableObject(objectOf(id), async (object, { storage }) => {
      await object.start({ job, maxFilesBytes: 64 * MIB, retentionSeconds: 60 });
      const state = new State(storage);
      state.noteCrash();
      await until(id, (seen) => seen.events.some(({ type }) => type === "agent.custom_tool_use"));
      expect(state.launch()).toBeDefined();
      expect(state.noteCrash()).toBe(1);
    });
  });

  it("stores nothing for a session that nobody started", async () => {
    expect(await objectOf("sesn_nobody").listFiles()).toBeUndefined();
    expect(await objectOf("sesn_nobody").readFile("/workspace/a")).toBeUndefined();
    const tables = await runInDurableObject(objectOf("sesn_nobody"), (_, state) =>
      state.storage.sql.exec("SELECT name FROM sqlite_master WHERE name IN ('state', 'nodes')").toArray(),
    );
    expect(tables).toEqual([]);
  });
});

describe.skipIf(env.EMULATOR_URL === "")("a claim", () => {
  afterEach(() => ask("DELETE", "faults"));

  it("that was not answered is settled: the heartbeat that stands still is ours", async () => {
    const { job, id } = await reserved([WRITE, "end"]);
    await ask("POST", "faults", { operation: "work.heartbeat", kind: "lose_response" });
    const lease = new Lease(job, undefined, () => undefined);
    await ackAndClaim(lease, false, new AbortController().signal, 50);
    expect([lease.isClaimed, lease.isFresh, lease.end]).toEqual([true, true, undefined]);
    expect(await claims(id)).toBe(1);
  });

  it("that was not answered is given up at once by a runner that is to leave", async () => {
    const { job, id } = await reserved([WRITE, "end"]);
    await ask("POST", "faults", { operation: "work.heartbeat", kind: "lose_response" });
    const leaving = new AbortController();
    const claiming = ackAndClaim(new Lease(job, undefined, () => undefined), false, leaving.signal);
    await vi.waitUntil(async () => (await claims(id)) === 1, { timeout: 60_000 });
    leaving.abort();
    await expect(claiming).rejects.toThrow("the claim was not answered");
    expect(await claims(id)).toBe(1);
  });

  it("that never arrived is sent again", async () => {
    const { job, id } = await reserved([WRITE, "end"]);
    await ask("POST", "faults", { operation: "work.heartbeat", kind: "drop" });
    const lease = new Lease(job, undefined, () => undefined);
    await ackAndClaim(lease, false, new AbortController().signal, 50);
    expect([lease.isClaimed, await claims(id)]).toEqual([true, 1]);
  });

  it("of an item that another runner holds is given up without a stop", async () => {
    const { job, id } = await reserved([WRITE, "end"]);
    await ackAndClaim(new Lease(job, undefined, () => undefined), false, new AbortController().signal, 50);
    const late = new Lease(job, undefined, () => undefined);
    await expect(ackAndClaim(late, false, new AbortController().signal, 50)).rejects.toThrow("the claim was refused");
    expect(await late.stop()).toBe(false);
    expect((await emulated(id)).work?.state).toBe("active");
  });
});

describe("a custom tool", () => {
  const parts = (state: DurableObjectState): { guard: Guard; signal: AbortController } => {
    const kept = new State(state.storage);
    kept.create();
    const job = { sessionId: "s", workId: "w", environmentId: "e", baseUrl: "http://unused.invalid", token: "t" };
    const rest = { isItemToken: true, maxIdleSeconds: 1, maxWaitSeconds: 1 };
    const signal = new AbortController();
    const lease = new Lease({ ...job, ...rest }, undefined, () => undefined);
    return {
      guard: new Guard({
        lease,
        log: new EventLog(),
        journal: kept.journal,
        signal: signal.signal,
        emit: () => undefined,
      }),
      signal,
    };
  };
  const tool = (run: () => Promise<string>) => ({
    type: "custom" as const,
    name: "theirs",
    description: "reaches outside",
    input_schema: { type: "object" as const },
    parse: (input: unknown) => input,
    run,
  });
  const context = (id: string) => {
    const toolUse = { type: "agent.tool_use" as const, id, name: "theirs", input: {}, processed_at: "" };
    return { toolUse, toolUseBlock: toolUse };
  };

  it("that a lost runner had begun is answered, not run again", () =>
    runInDurableObject(objectOf("custom-1"), async (_, state) => {
      let runs = 0;
      const forever = tool(() => {
        runs += 1;
        return new Promise(() => undefined);
      });
      void Promise.resolve(parts(state).guard.custom(forever).run({}, context("call_1"))).catch(() => undefined);
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
      await expect(parts(state).guard.custom(forever).run({}, context("call_1"))).rejects.toThrow(LOST);
      expect(runs).toBe(1);
    }));

  it("that had ended is answered with its result again", () =>
    runInDurableObject(objectOf("custom-2"), async (_, state) => {
      let runs = 0;
      const counted = tool(async () => `run ${++runs}`);
      expect(await parts(state).guard.custom(counted).run({}, context("call_2"))).toBe("run 1");
      expect(await parts(state).guard.custom(counted).run({}, context("call_2"))).toBe("run 1");
    }));

  it("ends with the runner, and does not start after it", () =>
    runInDurableObject(objectOf("custom-3"), async (_, state) => {
      const { guard, signal } = parts(state);
      const running = guard.custom(tool(() => new Promise(() => undefined))).run({}, context("call_3"));
      setTimeout(() => signal.abort(), LOOK_MS);
      await expect(running).rejects.toThrow("may have taken effect");
      await expect(guard.custom(tool(async () => "")).run({}, context("call_4"))).rejects.toThrow(
        "this was not started",
      );
    }));
});
