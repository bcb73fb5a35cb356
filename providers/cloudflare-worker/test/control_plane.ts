/** The emulator as the tests in workerd see it: its admin API, at EMULATOR_URL. */

import { env } from "cloudflare:test";
import type { BetaSelfHostedWork } from "@anthropic-ai/sdk/resources/beta/environments/work";
import { expect } from "vitest";
import { openClient } from "../_shared/api.ts";
import { type Job, jobFrom } from "../_shared/jobs.ts";
import { readSettings } from "../_shared/settings.ts";
import type { SessionObject } from "../src/session_object.ts";
import { MIB } from "./support.ts";

const PATIENCE_MS = 10_000;
export const LOOK_MS = 20;

export interface Emulated {
  work: { state: string } | null;
  events: { type: string }[];
}

export async function ask<T>(method: string, path: string, body?: unknown): Promise<T> {
  const init = {
    method,
    headers: { "content-type": "application/json" },
    ...(body ? { body: JSON.stringify(body) } : {}),
  };
  const response = await fetch(`${env.EMULATOR_URL}/_emulator/${path}`, init);
  const answer = await response.json<T>();
  expect(response.ok, JSON.stringify(answer)).toBe(true);
  return answer;
}

/** A session whose agent does `steps` and whose item is reserved, not acked. */
export async function reserved(
  steps: unknown[],
  settings: Record<string, string> = {},
): Promise<{ job: Job; id: string; next: () => Promise<Job> }> {
  const { environment_id, environment_key } = await ask<Record<string, string>>("POST", "environments", {});
  const all = {
    ANTHROPIC_ENVIRONMENT_ID: environment_id,
    ANTHROPIC_ENVIRONMENT_KEY: environment_key,
    ANTHROPIC_BASE_URL: env.EMULATOR_URL,
    SANDBOX_MAX_IDLE_SECONDS: "0.2",
    ...settings,
  };
  await ask("POST", "script", { steps });
  await ask("POST", "sessions", { text: "go", environment_id });
  const client = openClient(environment_key ?? "", env.EMULATOR_URL, { maxRetries: 0, timeout: 5_000 });
  const next = async (): Promise<Job> => {
    const item = (await client.beta.environments.work.poll(environment_id ?? "")) as BetaSelfHostedWork;
    return jobFrom(item, readSettings(all));
  };
  const job = await next();
  return { job, id: job.sessionId, next };
}

export function objectOf(id: string): DurableObjectStub<SessionObject> {
  return env.SESSIONS.getByName(id);
}

export function start(job: Job): Promise<string> {
  return objectOf(job.sessionId).start({ job, maxFilesBytes: 64 * MIB, retentionSeconds: 60 });
}

export function emulated(id: string): Promise<Emulated> {
  return ask<Emulated>("GET", `sessions/${id}`);
}

export function say(id: string, text: string): Promise<unknown> {
  const content = [{ type: "text", text }];
  return ask("POST", `sessions/${id}/events`, { events: [{ type: "user.message", content }] });
}

export async function until(id: string, isThere: (seen: Emulated) => boolean): Promise<Emulated> {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const seen = await emulated(id);
    if (isThere(seen)) return seen;
    expect(Date.now(), JSON.stringify([seen.work, seen.events.map((event) => event.type)])).toBeLessThan(deadline);
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
}

export const isStopped = (seen: Emulated): boolean => seen.work?.state === "stopped";

/** The heartbeats of a session's item, as (condition, status). */
export async function beats(id: string): Promise<[string, number][]> {
  const { data } = await ask<{ data: Record<string, unknown>[] }>("GET", "requests");
  return data
    .filter((each) => each["operation"] === "work.heartbeat" && String(each["path"]).includes(id))
    .map((each) => {
      const query = each["query"] as Record<string, string[]>;
      return [query["expected_last_heartbeat"]?.[0] ?? "", Number(each["status"])];
    });
}

export async function claims(id: string): Promise<number> {
  return (await beats(id)).filter(([condition, status]) => condition === "NO_HEARTBEAT" && status === 200).length;
}

export const WRITE = { call: { write: { file_path: "a", content: "1" } } };
