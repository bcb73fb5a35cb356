/** The job: what a runner is told, and nothing more (P5). */

import type { BetaSelfHostedWork } from "@anthropic-ai/sdk/resources/beta/environments/work";
import { JobRefused } from "./errors.ts";
import type { Settings } from "./settings.ts";

// Ids become names of objects and files; whatever else arrives is refused, not escaped.
const ID = /^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$/;
const TOKEN = /^[!-~]+$/; // an HTTP library would quote another in its error

/** One work item, as the runner needs it. */
export interface Job {
  readonly sessionId: string;
  readonly workId: string;
  readonly environmentId: string;
  readonly baseUrl: string;
  /** The item's own token, good for its session only. */
  readonly token: string;
  /** False when the item carried no secret and `token` is the environment key: it opens no memory store. */
  readonly isItemToken: boolean;
  readonly maxIdleSeconds: number;
  readonly maxWaitSeconds: number;
}

export function isId(value: unknown): value is string {
  return typeof value === "string" && ID.test(value);
}

/** Throws `JobRefused` for an item that is not ours, has an unusable id, or carries no usable secret. */
export function jobFrom(item: BetaSelfHostedWork, settings: Settings): Job {
  if (!isId(item.id)) throw new JobRefused("the item's work id is malformed");
  if (!isId(item.data?.id)) throw new JobRefused("the item's session id is malformed");
  if (item.environment_id !== settings.environmentId) throw new JobRefused("the item belongs to another environment");
  const token = sessionsToken(item.secret);
  if (token === undefined && !settings.allowEnvironmentKeyInSandbox) {
    throw new JobRefused(
      "the item carries no usable secret: ask Anthropic to enable per-session secrets, or set" +
        " ALLOW_ENVIRONMENT_KEY_IN_SANDBOX=true and accept that the sandbox holds the environment key",
    );
  }
  return {
    sessionId: item.data.id,
    workId: item.id,
    environmentId: item.environment_id,
    baseUrl: settings.baseUrl,
    token: token ?? settings.environmentKey,
    isItemToken: token !== undefined,
    maxIdleSeconds: settings.maxIdleSeconds,
    maxWaitSeconds: settings.maxWaitSeconds,
  };
}

/** The bearer inside a work item's secret: URL-safe base64 (padding optional) of JSON with `sessions_token`. */
export function sessionsToken(secret: string | null | undefined): string | undefined {
  if (!secret) return undefined;
  let payload: unknown;
  try {
    const binary = atob(secret.replaceAll("-", "+").replaceAll("_", "/").replace(/=+$/, ""));
    payload = JSON.parse(new TextDecoder().decode(Uint8Array.from(binary, (char) => char.charCodeAt(0))));
  } catch {
    return undefined;
  }
  if (typeof payload !== "object" || payload === null) return undefined;
  const token: unknown = (payload as Record<string, unknown>)["sessions_token"];
  return typeof token === "string" && TOKEN.test(token) ? token : undefined;
}
