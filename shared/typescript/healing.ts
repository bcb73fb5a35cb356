/**
 * Healing ends strands: sessions that wait for a tool result no runner will post (R9).
 *
 * It looks at state, not at causes. What was already done about a strand is read from the session's own event log, never
 * remembered here, so any host at any time comes to the same decision.
 *
 * - An item `starting` without a heartbeat (acked, never claimed): healing claims it, which only succeeds if no runner has or
 *   ever will, and stops it. Some servers never let such an item lapse.
 * - An item stopped for a while: the calls of the agent toolset that wait are answered with an error that says what was lost.
 *   The answer queues the session again, and a new runner serves what follows.
 * - If we answered since the item stopped and the session waits again, answers do not queue it on this server: one
 *   `user.interrupt` goes with them, which ends the turn and does.
 *
 * A finished session costs one small request, and only so many are looked at in a sweep: the latest to stop, where a strand
 * shows first, and some of the others at random, so that no host has to remember where the last one ended.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaSelfHostedWork } from "@anthropic-ai/sdk/resources/beta/environments/work";
import type {
  BetaManagedAgentsSessionEvent,
  BetaManagedAgentsSessionEventType,
} from "@anthropic-ai/sdk/resources/beta/sessions/events";
import { apiError, errorLabel, isStatus } from "./api.ts";
import { errorResult, OWNED_TOOLS } from "./events.ts";
import { NO_HEARTBEAT } from "./lease.ts";
import { log } from "./log.ts";

const STARTING_SECONDS = 150; // an acked item is claimed within milliseconds; this is longer than any launch may take
const STOPPED_SECONDS = 60; // a runner that hands over posts its answers right after its stop
export const LOST =
  "The sandbox was lost while this call was running. It may have taken effect; nothing more is known about it.";
const LATEST_PER_SWEEP = 30; // stopped items looked at: those that stopped last,
const OTHERS_PER_SWEEP = 20; // and some of the rest
const PAGE = 100;
const MAX_ITEMS = 10_000;
const STATUS_EVENTS: BetaManagedAgentsSessionEventType[] = [
  "session.status_running",
  "session.status_idle",
  "session.status_rescheduled",
  "session.status_terminated",
];

/** What a session waits for, as far as it is ours to answer. */
interface Strand {
  readonly callIds: readonly string[];
  /** An answer of ours is in the log since the item stopped. */
  readonly isTreated: boolean;
  /** Something that is not ours to answer waits too: a person's word, another client's tool, a call just made. */
  readonly othersWait: boolean;
}

/** The environment's work items, and the server's time by which their timestamps are judged. */
export interface WorkList {
  readonly items: readonly BetaSelfHostedWork[];
  readonly now: number;
}

export class Healer {
  readonly #client: Anthropic;
  readonly #environmentId: string;

  constructor(client: Anthropic, environmentId: string) {
    this.#client = client;
    this.#environmentId = environmentId;
  }

  /** Undefined when the API does not answer: the next sweep asks again. */
  async listWork(): Promise<WorkList | undefined> {
    const items: BetaSelfHostedWork[] = [];
    let page: string | undefined;
    let now = Date.now();
    try {
      for (;;) {
        const query = { limit: PAGE, ...(page === undefined ? {} : { page }) };
        const { data, response } = await this.#client.beta.environments.work
          .list(this.#environmentId, query)
          .withResponse();
        if (page === undefined) now = Date.parse(response.headers.get("date") ?? "") || now;
        items.push(...data.data);
        if (!data.next_page) return { items, now };
        if (items.length >= MAX_ITEMS) {
          log.warning("heal", { reason: `more than ${MAX_ITEMS} work items: the rest is not looked at` });
          return { items, now };
        }
        page = data.next_page;
      }
    } catch (error) {
      log.warning("heal", { error: errorLabel(apiError(error)), reason: "the work items cannot be listed" });
      return undefined;
    }
  }

  /** Ends the strands among the items. Returns how many sessions it treated. */
  async heal(list: WorkList): Promise<number> {
    let healed = 0;
    for (const item of candidates(list)) {
      try {
        const done = item.state === "starting" ? await this.#freeUnclaimed(item) : await this.#heal(item, list.now);
        if (done) healed += 1;
      } catch (error) {
        apiError(error);
        if (isStatus(error, 404)) continue; // deleted meanwhile
        log.warning("heal", { session: item.data.id, work: item.id, error: errorLabel(error) });
        if (isStatus(error, 429)) break; // the next sweep goes on
      }
    }
    return healed;
  }

  async #heal(item: BetaSelfHostedWork, now: number): Promise<boolean> {
    const sessionId = item.data.id;
    const awaited = await this.#awaited(sessionId);
    if (awaited.size === 0 || (await this.#client.beta.sessions.retrieve(sessionId)).status !== "idle") return false;
    const strand = await this.#strand(sessionId, awaited, now, age(item.stopped_at, now));
    if (strand.callIds.length === 0) return false;
    const answers = strand.callIds.map((id) => errorResult({ id, isCustom: false }, LOST));
    const interrupts = strand.isTreated && !strand.othersWait;
    const events = interrupts ? [...answers, { type: "user.interrupt" as const }] : answers;
    await this.#client.beta.sessions.events.send(sessionId, { events });
    const reason = `${answers.length} calls answered${interrupts ? ", turn interrupted" : ""}`;
    log.warning("healed", { session: sessionId, work: item.id, reason });
    return true;
  }

  /**
   * Claims an item that was acked and never claimed, and stops it. The claim is the fence: a runner that has it, or gets
   * there first, makes ours fail; one that comes later fails itself, before it runs anything.
   */
  async #freeUnclaimed(item: BetaSelfHostedWork): Promise<boolean> {
    const { work } = this.#client.beta.environments;
    try {
      const claim = { environment_id: this.#environmentId, expected_last_heartbeat: NO_HEARTBEAT };
      const beat = await work.heartbeat(item.id, claim, { maxRetries: 0 });
      if (!beat.lease_extended) return false;
    } catch (error) {
      if (isStatus(error, 412)) return false;
      throw error;
    }
    await work.stop(item.id, { environment_id: this.#environmentId, force: true });
    const reason = "acked and never claimed: stopped, so that it can be queued again";
    log.warning("healed", { session: item.data.id, work: item.id, reason });
    return true;
  }

  /** What the session waits for by its own last word, calls and all; empty when it does not wait. */
  async #awaited(sessionId: string): Promise<ReadonlySet<string>> {
    const query = { types: STATUS_EVENTS, order: "desc" as const, limit: 1 };
    const last = (await this.#client.beta.sessions.events.list(sessionId, query)).data[0];
    const reason = last?.type === "session.status_idle" ? last.stop_reason : undefined;
    return new Set(reason?.type === "requires_action" ? reason.event_ids : []);
  }

  /** Reads the event log. */
  async #strand(sessionId: string, awaited: ReadonlySet<string>, now: number, stoppedFor: number): Promise<Strand> {
    const calls: BetaManagedAgentsSessionEvent[] = [];
    const answered = new Set<string>();
    const allowed = new Set<string>();
    const endedThreads = new Set<string>();
    let isTreated = false;
    for await (const event of this.#client.beta.sessions.events.list(sessionId, { limit: 1000 })) {
      if (awaited.has(event.id)) calls.push(event);
      else if (event.type === "user.tool_result") {
        answered.add(event.tool_use_id);
        const isOurs = (event.content ?? []).some((block) => block.type === "text" && block.text === LOST);
        isTreated ||= isOurs && age(event.processed_at, now) < stoppedFor;
      } else if (event.type === "user.custom_tool_result") answered.add(event.custom_tool_use_id);
      else if (event.type === "user.tool_confirmation" && event.result === "allow") allowed.add(event.tool_use_id);
      else if (event.type === "session.thread_status_terminated") endedThreads.add(event.session_thread_id);
    }
    const open = [...awaited].filter((id) => !answered.has(id));
    // A call made since the items were listed may have a runner that was launched since.
    const ours = calls.filter(
      (call) =>
        call.type === "agent.tool_use" &&
        OWNED_TOOLS.has(call.name) &&
        open.includes(call.id) &&
        !endedThreads.has(call.session_thread_id ?? "") &&
        (call.evaluated_permission === "allow" || (call.evaluated_permission === "ask" && allowed.has(call.id))) &&
        age(call.processed_at, now) > STOPPED_SECONDS,
    );
    return { callIds: ours.map((call) => call.id), isTreated, othersWait: ours.length < open.length };
  }
}

function candidates({ items, now }: WorkList): BetaSelfHostedWork[] {
  const sessions = items.filter((item) => item.data.type === "session");
  const unclaimed = sessions.filter(
    (item) =>
      item.state === "starting" && !item.latest_heartbeat_at && age(item.acknowledged_at, now) > STARTING_SECONDS,
  );
  const stopped = sessions
    .filter((item) => item.state === "stopped" && age(item.stopped_at, now) > STOPPED_SECONDS)
    .sort((one, other) => age(one.stopped_at, now) - age(other.stopped_at, now));
  const others = sample(stopped.slice(LATEST_PER_SWEEP), OTHERS_PER_SWEEP);
  return [...unclaimed.slice(0, LATEST_PER_SWEEP), ...stopped.slice(0, LATEST_PER_SWEEP), ...others];
}

function sample<T>(values: readonly T[], count: number): T[] {
  return values
    .map((value) => ({ value, key: Math.random() }))
    .sort((one, other) => one.key - other.key)
    .slice(0, count)
    .map(({ value }) => value);
}

/** Seconds from `moment` to `now`, both the server's; 0 for what never happened. */
function age(moment: string | null | undefined, now: number): number {
  return moment ? (now - Date.parse(moment)) / 1000 : 0;
}
