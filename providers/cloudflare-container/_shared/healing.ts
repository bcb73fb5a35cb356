/**
 * Healing ends strands: sessions that wait for a tool result no runner will post (R9).
 *
 * It looks at state, not at causes. What was already done about a strand is read from the session's own event log, never
 * remembered here, so any host at any time comes to the same decision.
 *
 * - An item that no runner holds and that the server does not let go is stopped (freeing.ts).
 * - An item stopped for a while: the calls of ours that wait are answered with an error that says what was lost. The answer
 *   queues the session again, and a new runner serves what follows.
 * - If we answered since the item stopped and the session waits again, answers do not queue it on this server: one
 *   `user.interrupt` goes with them, which ends the turn and does.
 *
 * A finished session costs one small request, and only so many are looked at in a sweep: those a webhook has named since
 * the last one, the latest to stop, where a strand shows first, and some of the others at random, so that no host has to
 * remember where the last one ended.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaSelfHostedWork } from "@anthropic-ai/sdk/resources/beta/environments/work";
import type {
  BetaManagedAgentsSessionEvent,
  BetaManagedAgentsSessionEventType,
} from "@anthropic-ai/sdk/resources/beta/sessions/events";
import { apiError, errorLabel, isStatus } from "./api.ts";
import { type Call, errorResult, OWNED_TOOLS } from "./events.ts";
import { type Age, Freeing } from "./freeing.ts";
import { log } from "./log.ts";

const STOPPED_SECONDS = 60; // a runner that hands over posts its answers right after its stop
export const LOST =
  "The sandbox was lost while this call was running. It may have taken effect; nothing more is known about it.";
const LATEST_PER_SWEEP = 30; // stopped items looked at: those that stopped last,
const OTHERS_PER_SWEEP = 20; // and some of the rest
const LOOKS_PER_HINT = 3; // sweeps in which a session that a webhook has named comes first: its call is too young at the first
const MOST_HINTS = 1000;
const PAGE = 100;
const MAX_ITEMS = 10_000;
const STATUS_EVENTS: BetaManagedAgentsSessionEventType[] = [
  "session.status_running",
  "session.status_idle",
  "session.status_rescheduled",
  "session.status_terminated",
];

type CallEvent = Extract<BetaManagedAgentsSessionEvent, { type: "agent.tool_use" | "agent.custom_tool_use" }>;

/** What a session waits for, as far as it is ours to answer. */
interface Strand {
  readonly calls: readonly Pick<Call, "id" | "isCustom">[];
  /** An answer of ours is in the log since the item stopped. */
  readonly isTreated: boolean;
  /** Something that is not ours to answer waits too: a person's word, another client's tool, a call just made. */
  readonly othersWait: boolean;
}

/** The environment's work items, and the server's time by which their timestamps are judged, if it told. */
export interface WorkList {
  readonly items: readonly BetaSelfHostedWork[];
  readonly now: number | undefined;
}

/** Finds strands and ends them. What it remembers are hints where to look first; nothing depends on them. */
export class Healer {
  readonly #client: Anthropic;
  readonly #environmentId: string;
  readonly #ownTools: ReadonlySet<string>;
  readonly #freeing: Freeing;
  readonly #hints = new Map<string, number>();

  /** `ownTools`: the names of the custom tools that a runner here answers; others are another client's. */
  constructor(client: Anthropic, environmentId: string, ownTools: ReadonlySet<string> = new Set()) {
    this.#client = client;
    this.#environmentId = environmentId;
    this.#ownTools = ownTools;
    this.#freeing = new Freeing(client, environmentId);
  }

  /** Something happened to the session: the next sweeps look at it first, however long ago its item stopped. */
  hint(sessionId: string): void {
    this.#hints.delete(sessionId);
    this.#hints.set(sessionId, LOOKS_PER_HINT);
    const [oldest] = this.#hints.keys();
    if (this.#hints.size > MOST_HINTS && oldest !== undefined) this.#hints.delete(oldest);
  }

  /** Undefined when the API does not answer: the next sweep asks again. */
  async listWork(): Promise<WorkList | undefined> {
    const items: BetaSelfHostedWork[] = [];
    let page: string | undefined;
    let now: number | undefined;
    try {
      for (;;) {
        const query = { limit: PAGE, ...(page === undefined ? {} : { page }) };
        const { data, response } = await this.#client.beta.environments.work
          .list(this.#environmentId, query)
          .withResponse();
        if (page === undefined) now = serverTime(response.headers.get("date"));
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
    const age: Age = (moment) => secondsBetween(moment, list.now);
    for (const item of this.#candidates(list, age)) {
      try {
        const isDone = item.state === "stopped" ? await this.#heal(item, age) : await this.#free(item, age);
        if (isDone) healed += 1;
      } catch (error) {
        apiError(error);
        if (isStatus(error, 404)) continue; // deleted meanwhile
        if (isStatus(error, 429)) {
          log.warning("heal", {
            error: errorLabel(error),
            reason: "the API asks to slow down; the next sweep goes on",
          });
          break;
        }
        log.warning("heal", { session: item.data.id, work: item.id, error: errorLabel(error) });
      }
    }
    return healed;
  }

  #candidates({ items }: WorkList, age: Age): BetaSelfHostedWork[] {
    const sessions = items.filter((item) => item.data.type === "session");
    const held = sessions.filter((item) => this.#freeing.isDue(item, age));
    const stopped = sessions
      .filter((item) => item.state === "stopped" && age(item.stopped_at) > STOPPED_SECONDS)
      .sort((one, other) => age(one.stopped_at) - age(other.stopped_at));
    const hinted = stopped.filter((item) => this.#hints.has(item.data.id));
    const rest = stopped.filter((item) => !this.#hints.has(item.data.id));
    for (const [sessionId, looks] of [...this.#hints]) {
      if (looks > 1) this.#hints.set(sessionId, looks - 1);
      else this.#hints.delete(sessionId);
    }
    const others = sample(rest.slice(LATEST_PER_SWEEP), OTHERS_PER_SWEEP);
    return [held, hinted, rest].flatMap((each) => each.slice(0, LATEST_PER_SWEEP)).concat(others);
  }

  /**
   * A stop may queue the session again. So what waits is answered at once if a runner has had the item: the next one, on
   * another disk, could not know what was begun.
   */
  async #free(item: BetaSelfHostedWork, age: Age): Promise<boolean> {
    if (!(await this.#freeing.free(item))) return false;
    if (item.latest_heartbeat_at) await this.#heal(item, age);
    return true;
  }

  async #heal(item: BetaSelfHostedWork, age: Age): Promise<boolean> {
    const sessionId = item.data.id;
    const awaited = await this.#awaited(sessionId);
    if (awaited.size === 0 || (await this.#client.beta.sessions.retrieve(sessionId)).status !== "idle") return false;
    const strand = await this.#strand(sessionId, awaited, age, age(item.stopped_at));
    if (strand.calls.length === 0) return false;
    const answers = strand.calls.map((call) => errorResult(call, LOST));
    const interrupts = strand.isTreated && !strand.othersWait;
    const events = interrupts ? [...answers, { type: "user.interrupt" as const }] : answers;
    // At once: the first answer queues the session, and its next runner must not find the second call open. A 400 for all
    // of them says that one was answered meanwhile; the log says which, at the next sweep.
    await this.#client.beta.sessions.events.send(sessionId, { events });
    const reason = `${answers.length} calls answered${interrupts ? ", turn interrupted" : ""}`;
    log.warning("healed", { session: sessionId, work: item.id, reason });
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
  async #strand(sessionId: string, awaited: ReadonlySet<string>, age: Age, stoppedFor: number): Promise<Strand> {
    const calls: CallEvent[] = [];
    const answered = new Set<string>();
    const verdicts = new Map<string, string>();
    const endedThreads = new Set<string>();
    let isTreated = false;
    for await (const event of this.#client.beta.sessions.events.list(sessionId, { limit: 1000 })) {
      // Since the items were listed something happened: a person's word, a message, a runner of theirs. What the list says
      // of the item may be over, and the next sweep's will tell.
      if (age(event.processed_at) < 0) return { calls: [], isTreated, othersWait: true };
      if (awaited.has(event.id)) {
        if (event.type === "agent.tool_use" || event.type === "agent.custom_tool_use") calls.push(event);
      } else if (event.type === "user.tool_result" || event.type === "user.custom_tool_result") {
        answered.add(event.type === "user.tool_result" ? event.tool_use_id : event.custom_tool_use_id);
        const isOurs = (event.content ?? []).some((block) => block.type === "text" && block.text === LOST);
        isTreated ||= isOurs && age(event.processed_at) < stoppedFor;
      } else if (event.type === "user.tool_confirmation") verdicts.set(event.tool_use_id, event.result);
      else if (event.type === "session.thread_status_terminated") endedThreads.add(event.session_thread_id);
    }
    const open = [...awaited].filter((id) => !answered.has(id));
    // A call made since the items were listed may have a runner that was launched since.
    const ours = calls.filter(
      (call) =>
        open.includes(call.id) &&
        !endedThreads.has(call.session_thread_id ?? "") &&
        this.#isOursToAnswer(call, verdicts) &&
        age(call.processed_at) > STOPPED_SECONDS,
    );
    return {
      calls: ours.map(({ id, type }) => ({ id, isCustom: type === "agent.custom_tool_use" })),
      isTreated,
      othersWait: ours.length < open.length,
    };
  }

  /** A call that a runner would have run: of a custom tool of ours, or of the agent toolset and allowed, by a rule or a person. */
  #isOursToAnswer(call: CallEvent, verdicts: ReadonlyMap<string, string>): boolean {
    if (call.type === "agent.custom_tool_use") return this.#ownTools.has(call.name);
    if (!OWNED_TOOLS.has(call.name)) return false;
    const permission = call.evaluated_permission;
    return permission === "allow" || (permission === "ask" && verdicts.get(call.id) === "allow");
  }
}

function sample<T>(values: readonly T[], count: number): T[] {
  return values
    .map((value) => ({ value, key: Math.random() }))
    .sort((one, other) => one.key - other.key)
    .slice(0, count)
    .map(({ value }) => value);
}

/** What the `Date` of an answer says. Without it no strand can be told: a host's own clock may be wrong. */
function serverTime(date: string | null): number | undefined {
  const now = Date.parse(date ?? "");
  if (!Number.isNaN(now)) return now;
  log.warning("heal", {
    reason: "the API's answer has no usable Date: does a proxy remove it? Nothing is healed",
  });
  return undefined;
}

/** From `moment` to `now`, both the server's; 0 for what never happened, or when the server does not tell its time. */
function secondsBetween(moment: string | null | undefined, now: number | undefined): number {
  return moment && now !== undefined ? (now - Date.parse(moment)) / 1000 : 0;
}
