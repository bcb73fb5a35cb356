/** What a runner says: one JSON object a line, and by which of them a start is judged. */

import { LaunchFailed } from "../_shared/errors.ts";
import type { Job } from "../_shared/jobs.ts";
import type { Emit } from "../_shared/log.ts";
import type { FolderSettings } from "./settings.ts";

const NOT_NEEDED_EXITS = new Set([0, 76]); // done or served by another; the lease is another's
const RETRIABLE_EXITS = new Set([73, 143]); // the lock was held; told to leave
const LONGEST_REASON = 300;
const LONGEST_LINE = 64 * 1024;

/** The job as `sandbox_runner.py` reads it from its stdin (R11): the SDK's names, and no more than it needs. */
export function toStdin(job: Job, settings: Pick<FolderSettings, "tools" | "toolNames">): string {
  const secret = btoa(JSON.stringify({ sessions_token: job.token }))
    .replaceAll("+", "-")
    .replaceAll("/", "_")
    .replace(/=+$/, "");
  return JSON.stringify({
    ANTHROPIC_SESSION_ID: job.sessionId,
    ANTHROPIC_WORK_ID: job.workId,
    ANTHROPIC_ENVIRONMENT_ID: job.environmentId,
    ANTHROPIC_BASE_URL: job.baseUrl,
    ...(job.isItemToken ? { ANTHROPIC_WORK_SECRET: secret } : { ANTHROPIC_ENVIRONMENT_KEY: job.token }),
    SANDBOX_MAX_IDLE_SECONDS: String(job.maxIdleSeconds),
    SANDBOX_MAX_WAIT_SECONDS: String(job.maxWaitSeconds),
    ...(settings.tools === "" ? {} : { SANDBOX_TOOLS: settings.tools }),
    ...(settings.toolNames.length === 0 ? {} : { SANDBOX_TOOL_NAMES: settings.toolNames.join(",") }),
  });
}

/** The lines of a stream, up to its end or to where it breaks. A longer one than a runner writes comes in pieces. */
export async function* linesOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(() => ({ done: true, value: undefined })); // it broke
      const lines = (rest + decoder.decode(value, { stream: !done })).split("\n");
      rest = lines.pop() ?? "";
      if (done || rest.length > LONGEST_LINE) {
        lines.push(rest);
        rest = "";
      }
      yield* lines.filter((line) => line.trim() !== "");
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => undefined); // it is broken already
  }
}

/**
 * Reads up to the line that decides a start: the one place that does. "ready": the runner has its lock and the SDK, and is
 * about to ack. "served_already": another one serves the item. Throws `LaunchFailed`.
 */
export async function readReady(
  lines: AsyncGenerator<string>,
  say: (line: string) => void,
): Promise<"ready" | "served_already"> {
  let lastWords = "no output";
  for (;;) {
    const { done, value } = await lines.next();
    if (done) throw new LaunchFailed("the connection to the container broke", { retriable: true });
    say(value);
    const record = parsed(value);
    if (record?.["event"] === "ready") return "ready";
    if (record?.["event"] === "exit") {
      const code = Number(record["code"]);
      if (NOT_NEEDED_EXITS.has(code)) return "served_already";
      const reason = `the runner exited with ${code} before it was ready: ${cut(String(record["reason"]))}`;
      throw new LaunchFailed(reason, { retriable: RETRIABLE_EXITS.has(code) });
    }
    if (record?.["event"] === "ended") {
      const reason = `the runner ended with ${record["code"]} before it was ready: ${cut(lastWords)}`;
      throw new LaunchFailed(reason, { retriable: true });
    }
    if (record === undefined) lastWords = value;
  }
}

/** Passes a runner's line on to the Worker's log, with the session it is about: many share one log. */
export function sayIn(emit: Emit, line: string): void {
  const record = parsed(line);
  if (record === undefined) {
    emit("output", { text: cut(line) });
    return;
  }
  const { event, ...values } = record;
  emit(String(event), values as Record<string, string | number | boolean>);
}

function parsed(line: string): Record<string, unknown> | undefined {
  try {
    const record: unknown = JSON.parse(line);
    return typeof record === "object" && record !== null && "event" in record
      ? (record as Record<string, unknown>)
      : undefined;
  } catch {
    return undefined;
  }
}

function cut(text: string): string {
  return text.slice(-LONGEST_REASON);
}
