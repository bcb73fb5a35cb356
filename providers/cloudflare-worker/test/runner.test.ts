/** One runner against a control plane: what it does when it cannot leave, and when it cannot begin. */

import { env } from "cloudflare:test";
import { afterEach, describe, expect, it } from "vitest";
import { SetupFailed } from "../_shared/errors.ts";
import type { Outcome } from "../_shared/guard.ts";
import type { LeaseRecord } from "../_shared/lease.ts";
import { type Hands, Runner, type RunnerStore } from "../_shared/runner.ts";
import { ask, claims, emulated, isStopped, reserved, until } from "./control_plane.ts";

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

describe.skipIf(env.EMULATOR_URL === "")("a runner", () => {
  afterEach(() => ask("DELETE", "faults"));

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
