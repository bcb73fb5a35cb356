/**
 * Answers a runner gives in a tool's place, so that nobody waits for a result that will not come (R5, P1, P3).
 *
 * At the start: to calls whose turn was interrupted. After our stop: to calls that came in its last instant, which the
 * server does not queue again by itself.
 */

import type Anthropic from "@anthropic-ai/sdk";
import { apiError, errorLabel, isStatus } from "./api.ts";
import { type Call, type EventLog, errorResult, isOurs, type ResultEvent, readLog, recentLog } from "./events.ts";
import type { Journal } from "./guard.ts";
import type { Lease } from "./lease.ts";
import type { Emit } from "./log.ts";

export const INTERRUPTED_BEFORE = "the turn was interrupted before this had an answer; it was not run again";
export const NEVER_STARTED = "the sandbox was shut down before this was started; nothing of it was run";
const LOOK_AGAIN_MS = 1_000;

export class Answers {
  readonly #api: Anthropic;
  readonly #sessionId: string;
  readonly #emit: Emit;

  constructor(api: Anthropic, sessionId: string, emit: Emit) {
    this.#api = api;
    this.#sessionId = sessionId;
    this.#emit = emit;
  }

  /** Reads the log and answers what an interrupt left open before us: calls of ours, and those that were begun here. */
  async settlePredecessors(
    log: EventLog,
    customTools: ReadonlySet<string>,
    journal: Journal,
    signal: AbortSignal,
  ): Promise<void> {
    try {
      await readLog(this.#api, this.#sessionId, log, signal);
    } catch (error) {
      this.#tell(error, signal);
      return;
    }
    const ended = [...log.interrupted.values()].filter((call) => !log.answered.has(call.id));
    const ours = ended.filter((call) => journal.find(call.id) !== undefined || isOurs(call, customTools));
    await this.send(
      ours.map((call) => errorResult(call, INTERRUPTED_BEFORE)),
      signal,
    );
  }

  /**
   * Once our stop is confirmed: a message that the session took up between our last look and the stop had a live item, so
   * it queued none. What it led to is answered, which does; while the model still works, we look again, until `signal`.
   */
  async lookBack(
    lease: Lease,
    owned: ReadonlySet<string>,
    settled: ReadonlyMap<string, Call>,
    signal: AbortSignal,
  ): Promise<void> {
    try {
      while (!signal.aborted && !(await recentLog(this.#api, this.#sessionId, settled, signal)).isOver) {
        const log = await readLog(this.#api, this.#sessionId, undefined, signal);
        if (log.onlyWaits(owned)) return;
        if ((await lease.probe())?.state !== "stopped") return; // queued again already, perhaps served
        const waiting = [...log.open.values()].filter((call) => owned.has(call.name));
        const answers = waiting.map((call) => errorResult(call, NEVER_STARTED));
        if (answers.length > 0) return await this.send(answers, signal);
        await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN_MS));
      }
    } catch (error) {
      this.#tell(error, signal); // the sweep looks in our place
    }
  }

  /** The session cannot be set up here: its agent is told why, by answers to the calls of ours. */
  async refuseAll(log: EventLog, customTools: ReadonlySet<string>, reason: string): Promise<void> {
    const ours = [...log.open.values()].filter((call) => isOurs(call, customTools));
    await this.send(ours.map((call) => errorResult(call, reason)));
  }

  /** One by one: a request with several is refused as a whole, and one of them may be answered already. */
  async send(events: readonly ResultEvent[], signal?: AbortSignal): Promise<void> {
    for (const event of events) {
      if (signal?.aborted) return;
      try {
        await this.#api.beta.sessions.events.send(this.#sessionId, { events: [event] }, { signal });
      } catch (error) {
        if (isStatus(apiError(error), 400)) continue; // nobody waits for it any more
        this.#tell(error, signal); // the sweep's healing answers in our place
      }
    }
  }

  #tell(error: unknown, signal?: AbortSignal): void {
    const label = errorLabel(apiError(error));
    if (!signal?.aborted) this.#emit("retry", { error: label, attempt: 0 });
  }
}
