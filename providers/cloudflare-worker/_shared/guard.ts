/**
 * Every tool the agent can call, wrapped (R5): it starts only under a fresh lease, and never runs twice (P3).
 *
 * A tool of ours changes only what lies in the runner's own storage. Its change and its result are therefore written in one
 * transaction: a runner that dies leaves neither or both, and its successor posts the result that was not posted. A custom
 * tool reaches outside: it is written down before it runs, and what a dead runner had begun is answered with an error.
 */

import type { BetaRunnableTool } from "@anthropic-ai/sdk/lib/tools/BetaRunnableTool";
import { ToolError } from "@anthropic-ai/sdk/lib/tools/ToolError";
import type { Call, EventLog, ResultEvent } from "./events.ts";
import type { Lease } from "./lease.ts";
import type { Emit } from "./log.ts";

export const NOT_STARTED = "the sandbox is shutting down; this was not started";
export const INTERRUPTED = "the sandbox was shut down while this ran; it may have taken effect";
export const TURN_INTERRUPTED = "the turn was interrupted before this was run; nothing of it was run";
export const LOST = "the sandbox was lost while this ran; it may have taken effect, and was not run again";

/** A tool of ours. One that changes something does so at once, in a transaction; one that only looks may take its time. */
export type OwnTool = {
  readonly name: string;
  readonly description: string;
  readonly input_schema: { readonly type: "object"; readonly properties: object; readonly required?: string[] };
} & (
  | { readonly changes: true; run(input: Record<string, unknown>): string }
  | { readonly changes: false; run(input: Record<string, unknown>, signal: AbortSignal): Promise<string> | string }
);

type Content = Awaited<ReturnType<BetaRunnableTool["run"]>>;

/** How a call ended. */
export interface Outcome {
  readonly content: Content;
  readonly isError: boolean;
}

/** The calls begun on this storage, by this runner and by those before it. */
export interface Journal {
  /** "begun" without an outcome is a call that something outside may have seen. */
  find(callId: string): Outcome | "begun" | undefined;
  begin(callId: string): void;
  finish(callId: string, outcome: Outcome): void;
  /** Its result is in the session's log. */
  forget(callId: string): void;
  /** All of `work`, or, when it throws, nothing of it. */
  atomically<T>(work: () => T): T;
}

/** What stands between the SDK's dispatcher and a tool. `signal` ends the runner. */
export class Guard {
  readonly #lease: Lease;
  readonly #log: EventLog;
  readonly #journal: Journal;
  readonly #signal: AbortSignal;
  readonly #emit: Emit;
  /** Calls that run now. */
  running = 0;

  constructor(parts: { lease: Lease; log: EventLog; journal: Journal; signal: AbortSignal; emit: Emit }) {
    this.#lease = parts.lease;
    this.#log = parts.log;
    this.#journal = parts.journal;
    this.#signal = parts.signal;
    this.#emit = parts.emit;
  }

  own(tool: OwnTool): BetaRunnableTool<Record<string, unknown>> {
    return {
      type: "custom",
      name: tool.name,
      description: tool.description,
      input_schema: tool.input_schema,
      parse: asObject,
      run: (input, context) =>
        this.#run(tool.name, context?.toolUse.id ?? "", async (callId) => {
          if (!tool.changes) return outcomeOf(() => tool.run(input, this.#signal));
          return this.#journal.atomically(() => {
            const outcome = this.#attempt(() => tool.run(input));
            this.#journal.finish(callId, outcome);
            return outcome;
          });
        }),
    };
  }

  custom(tool: BetaRunnableTool): BetaRunnableTool {
    return {
      ...tool,
      run: (input: unknown, context) =>
        this.#run(tool.name, context?.toolUse.id ?? "", async (callId) => {
          this.#journal.begin(callId);
          const outcome = await outcomeOf(() => unlessOver(tool.run(input, context), this.#signal));
          this.#journal.finish(callId, outcome);
          return outcome;
        }),
    };
  }

  async #run(name: string, callId: string, work: (callId: string) => Promise<Outcome>): Promise<Content> {
    const known = this.#journal.find(callId);
    if (known === "begun") throw new ToolError(LOST);
    if (known === undefined) {
      await this.#lease.waitFresh(this.#signal);
      if (this.#signal.aborted) throw new ToolError(NOT_STARTED);
      if (this.#log.interrupted.has(callId)) throw new ToolError(TURN_INTERRUPTED);
    }
    const began = Date.now();
    this.running += 1;
    try {
      const { content, isError } = known ?? (await work(callId));
      this.#emit("tool", { name, ms: Date.now() - began, is_error: isError });
      if (isError) throw new ToolError(content);
      return content;
    } finally {
      this.running -= 1;
    }
  }

  /** A change, or the agent's own mistake and no change at all. Anything else it throws is ours, and goes on. */
  #attempt(work: () => string): Outcome {
    try {
      return { content: this.#journal.atomically(work), isError: false };
    } catch (error) {
      if (error instanceof ToolError) return { content: error.content, isError: true };
      throw error;
    }
  }
}

/** The event that posts an outcome. Content that is no text came from a custom tool of the SDK's shape. */
export function resultOf(call: Call, outcome: Outcome): ResultEvent {
  const content =
    typeof outcome.content === "string"
      ? [{ type: "text" as const, text: outcome.content || "(no output)" }]
      : outcome.content;
  const event = { is_error: outcome.isError, content: content as NonNullable<ResultEvent["content"]> };
  return call.isCustom
    ? { type: "user.custom_tool_result", custom_tool_use_id: call.id, ...event }
    : { type: "user.tool_result", tool_use_id: call.id, ...event };
}

async function outcomeOf(work: () => Promise<Content> | Content): Promise<Outcome> {
  try {
    return { content: await work(), isError: false };
  } catch (error) {
    // As the SDK words it.
    const content =
      error instanceof ToolError ? error.content : `Error: ${error instanceof Error ? error.message : String(error)}`;
    return { content, isError: true };
  }
}

async function unlessOver<T>(work: Promise<T> | T, signal: AbortSignal): Promise<T> {
  const over = new Promise<never>((_, reject) => {
    signal.addEventListener("abort", () => reject(new ToolError(INTERRUPTED)), { once: true });
  });
  return Promise.race([work, over]);
}

function asObject(input: unknown): Record<string, unknown> {
  return typeof input === "object" && input !== null ? (input as Record<string, unknown>) : {};
}
