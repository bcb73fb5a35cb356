/** One runner against a control plane: what it does when it cannot leave, and when it cannot begin. */

import { env } from "cloudflare:test";
import { afterEach, describe, expect, it, vi } from "vitest";
import { NEVER_STARTED } from "../_shared/answers.ts";
import { SetupFailed } from "../_shared/errors.ts";
import type { Outcome } from "../_shared/guard.ts";
import type { LeaseRecord } from "../_shared/lease.ts";
import { type Hands, Runner, type RunnerStore } from "../_shared/runner.ts";
import { ask, claims, emulated, isStopped, LOOK_MS, reserved, say, until } from "./control_plane.ts";

/** What a runner keeps, for as long as the test runs. */
function memory(): RunnerStore {
  let lease: LeaseRecord | undefined;
  const calls = new Map<string, Outcome | "begun">();
  return {
    lease: () => lease,
    saveLease: (record) => {
      lease = record;
    },
    journal: {
      find: (id) => calls.get(id),
      begin: (id) => void calls.set(id, "begun"),
      finish: (id, outcome) => void calls.set(id, outcome),
      forget: (id) => void calls.delete(id),
      atomically: (work) => work(),
    },
  };
}

const mine = {
  type: "custom" as const,
  name: "mine",
  description: "a tool of this deployment's",
  input_schema: { type: "object" as const },
  parse: (input: unknown) => input,
  run: async () => "mine answered",
};

function hands(setUp: () => Promise<void> = async () => undefined): Hands {
  return { setUp, sync: async () => undefined, tools: [], customTools: [mine] };
}

/** The result of a call of the custom tool `name`: its id, and what the log has for it. */
async function resultOf(id: string, name: string): Promise<{ id: string; result: unknown }> {
  const { events } = (await emulated(id)) as unknown as { events: Record<string, unknown>[] };
  const call = events.find((event) => event["type"] === "agent.custom_tool_use" && event["name"] === name);
  const result = events.find((event) => event["custom_tool_use_id"] === call?.["id"]);
  return { id: String(call?.["id"]), result };
}

type Send = () => Promise<Response>;

/** Does `what` with the first request of that kind after which `isDue`; all others go to the server. */
function divert(method: string, path: RegExp, what: (send: Send) => Promise<Response>, isDue = () => true): void {
  const send = globalThis.fetch;
  let isMet = false;
  vi.spyOn(globalThis, "fetch").mockImplementation((input, init) => {
    const isIt = init?.method?.toUpperCase() === method && path.test(new URL(String(input)).pathname) && isDue();
    if (isMet || !isIt) return send(input, init);
    isMet = true;
    return what(() => send(input, init));
  });
}

describe.skipIf(env.EMULATOR_URL === "")("a runner", () => {
  afterEach(() => {
    vi.restoreAllMocks();
    return ask("DELETE", "faults");
  });

  it.each(["answered", "lost"])("looks back after its own stop, %s, for a last message", async (fate) => {
    const { job, id } = await reserved(["end", { custom: { mine: {} } }, "end"]);
    divert("POST", /\/stop$/, async (send) => {
      await say(id, "and on");
      const answer = await send();
      if (fate === "lost") throw new TypeError("the connection was lost");
      return answer;
    });
    const exit = await new Runner(job, memory(), hands(), () => undefined).run();
    expect(exit).toEqual({ code: 0, reason: "the session is idle" });
    expect(JSON.stringify((await resultOf(id, "mine")).result)).toContain(NEVER_STARTED);
    expect((await emulated(id)).work?.state).toBe("queued");
  });

  it("starts no call while its stop may have been recorded", async () => {
    const { job, id } = await reserved(["end", { custom: { mine: {} } }, "end"]);
    const run = vi.spyOn(mine, "run");
    divert("POST", /\/stop$/, async (send) => {
      await say(id, "and on");
      await send();
      await ask("POST", "faults", { operation: "work.heartbeat", kind: "fail", status: 500, count: 3 });
      throw new TypeError("the connection was lost");
    });
    const setUp = vi.fn(async () => undefined);
    const runner = new Runner(job, memory(), hands(setUp), () => undefined, 20);
    const running = runner.run();
    const moment = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
    while (setUp.mock.calls.length < 2 && runner.lease.end === undefined) await moment(LOOK_MS);
    await moment(500);
    await runner.lease.beat();
    expect(await running).toEqual({ code: 0, reason: "the session is idle" });
    expect(run).not.toHaveBeenCalled();
    expect((await resultOf(id, "mine")).result).toMatchObject({ is_error: true });
  });

  it("hears that it is to leave, also while it reads what came before it", async () => {
    const { job } = await reserved(["end"]);
    let leave = (): void => undefined;
    divert("GET", /\/events$/, () => {
      leave();
      return new Promise(() => undefined);
    });
    const runner = new Runner(job, memory(), hands(), () => undefined);
    leave = () => runner.leave();
    expect(await runner.run()).toEqual({ code: 143, reason: "another runner of this session takes over" });
  });

  it("hears that it is to leave, also while it looks back", async () => {
    const { job, id } = await reserved(["end"]);
    let leave = (): void => undefined;
    const hang = (): Promise<Response> => {
      leave();
      return new Promise(() => undefined);
    };
    divert("GET", /\/events$/, hang, () => runner.lease.isStopped);
    const runner = new Runner(job, memory(), hands(), () => undefined);
    leave = () => runner.leave();
    expect(await runner.run()).toEqual({ code: 0, reason: "the session is idle" });
    expect((await emulated(id)).work?.state).toBe("stopped");
  });

  it("that could not leave serves on under the same lease, and leaves when it has waited again", async () => {
    const steps = [{ custom: { theirs: {} } }, { custom: { mine: {} } }, { custom: { theirs: {} } }, "end"];
    const { job, id } = await reserved(steps, { SANDBOX_MAX_WAIT_SECONDS: "0.3" });
    await ask("POST", "faults", { operation: "work.stop", kind: "fail", status: 500, count: 3 });
    const lines: string[] = [];
    const running = new Runner(job, memory(), hands(), (event) => void lines.push(event)).run();
    await until(id, () => lines.includes("claimed"));
    for (;;) {
      const { data } = await ask<{ data: { operation: string; status: number }[] }>("GET", "requests");
      if (data.filter(({ operation, status }) => operation === "work.stop" && status === 500).length === 3) break;
    }
    const { id: left } = await resultOf(id, "theirs");
    const result = { type: "user.custom_tool_result", custom_tool_use_id: left, content: [] };
    await ask("POST", `sessions/${id}/events`, { events: [result] });
    await until(id, isStopped);
    expect(await running).toEqual({ code: 0, reason: "nobody else went on" });
    expect(JSON.stringify((await resultOf(id, "mine")).result)).toContain("mine answered");
    expect([await claims(id), lines.filter((line) => line === "retry")]).toEqual([1, []]);
  });

  it("tells the agent why, when set-up goes on failing however slowly, also in the place of a tool of ours", async () => {
    const { job, id } = await reserved([{ custom: { mine: {} } }, "end"], { SANDBOX_MAX_IDLE_SECONDS: "0.01" });
    const slow = async (): Promise<void> => {
      await new Promise((resolve) => setTimeout(resolve, 50));
      throw new SetupFailed("no room for a memory store");
    };
    const exit = await new Runner(job, memory(), hands(slow), () => undefined, 20).run();
    expect(exit.reason).toBe("set-up failed 3 times (no room for a memory store); the agent was told");
    const { result } = await resultOf(id, "mine");
    expect(result).toMatchObject({ is_error: true });
    expect(JSON.stringify(result)).toContain("could not be set up for this session (no room for a memory store)");
  });
});
