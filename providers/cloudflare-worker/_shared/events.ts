/**
 * What a session's event log adds up to: which calls wait, for whom, and whether a turn is over (R4, R5).
 *
 * The log is read whole at the start and after the stop, its last page before each stop, and event by event as the SDK's
 * tool runner gets them (hearing.ts). One class folds all three.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type {
  BetaManagedAgentsSessionEvent,
  BetaManagedAgentsStreamSessionEvents,
} from "@anthropic-ai/sdk/resources/beta/sessions/events";
import { isStatus } from "./api.ts";

export type SessionEvent = BetaManagedAgentsSessionEvent | BetaManagedAgentsStreamSessionEvents;

/** The SDK's agent toolset. */
export const OWNED_TOOLS: ReadonlySet<string> = new Set(["bash", "read", "write", "edit", "glob", "grep"]);
const RECENT_EVENTS = 100;
const PAGE = 1000;

/** One call the agent made, by the id of its event. */
export interface Call {
  readonly id: string;
  readonly name: string;
  readonly threadId: string | undefined;
  readonly isCustom: boolean;
}

/** Whether a call is a runner's, where `customTools` are the names of its own. */
export function isOurs(call: Call, customTools: ReadonlySet<string>): boolean {
  return (call.isCustom ? customTools : OWNED_TOOLS).has(call.name);
}

/** The event that answers a call that did not run to its end. */
export function errorResult(call: Pick<Call, "id" | "isCustom">, text: string): ResultEvent {
  const content = [{ type: "text" as const, text }];
  return call.isCustom
    ? { type: "user.custom_tool_result", custom_tool_use_id: call.id, is_error: true, content }
    : { type: "user.tool_result", tool_use_id: call.id, is_error: true, content };
}

type SentEvent = Parameters<Anthropic["beta"]["sessions"]["events"]["send"]>[1]["events"][number];
export type ResultEvent = Extract<SentEvent, { type: "user.tool_result" | "user.custom_tool_result" }>;

/** The fold. Takes events in the log's order; an event that comes twice, listed and streamed, counts once. */
export class EventLog {
  /** Calls that wait for a result and for nobody's word, in the order in which the SDK takes them up. */
  readonly open = new Map<string, Call>();
  /** Calls whose turn an interrupt ended. The log leaves them open, and nothing waits for them. */
  readonly interrupted = new Map<string, Call>();
  readonly answered = new Set<string>();
  /** How often it has been read to its end. */
  readings = 0;
  #turn: "none" | "running" | "requires_action" | "ended" = "none";
  #awaited: ReadonlySet<string> = new Set();
  readonly #held = new Map<string, Call>();
  #primary: string | undefined;
  readonly #unprocessed = new Set<string>();
  #hasNewInput = false;
  readonly #settled: ReadonlyMap<string, Call>;
  readonly #seen = new Set<string>();
  #lastAt = Date.now();

  /** `settled`: calls known elsewhere as interrupted; their answers are no input. */
  constructor(settled: ReadonlyMap<string, Call> = new Map()) {
    this.#settled = settled;
  }

  note(event: SessionEvent): void {
    if (!("id" in event) || !event.id) return; // of a kind newer than this SDK, or a preview
    const isWaiting = event.type.startsWith("user.") && !("processed_at" in event && event.processed_at);
    if (this.#seen.has(event.id) || (isWaiting && this.#unprocessed.has(event.id))) return;
    this.touch();
    if (isWaiting) {
      this.#unprocessed.add(event.id);
      return;
    }
    this.#seen.add(event.id);
    this.#unprocessed.delete(event.id);
    this.#noteStatus(event);
    this.#noteCall(event);
  }

  /** Something has happened. */
  touch(): void {
    this.#lastAt = Date.now();
  }

  /** How long nothing has happened. */
  get quietSeconds(): number {
    return (Date.now() - this.#lastAt) / 1000;
  }

  /** There was no turn yet: a first message is waited for. */
  get hasNotBegun(): boolean {
    return this.#turn === "none";
  }

  /** The session is gone, or its last turn has ended and nothing new has come since. */
  get isOver(): boolean {
    return this.#turn === "ended" && !this.#hasNewInput && this.#unprocessed.size === 0;
  }

  /** What the session's own last word was, and which calls it waits for. */
  get waitsFor(): string {
    return [this.#turn, ...[...this.#awaited].sort()].join(" ");
  }

  /**
   * The session does nothing until somebody else does: a person with a word, another client with its tool's result,
   * anybody with a first message. `owned` are the names of the tools that are ours to run.
   */
  onlyWaits(owned: ReadonlySet<string>): boolean {
    if (this.#turn === "requires_action") {
      return ![...this.open.values()].some((call) => this.#awaited.has(call.id) && owned.has(call.name));
    }
    return this.isOver || (this.#turn === "none" && !this.#hasNewInput && this.#unprocessed.size === 0);
  }

  /**
   * Whether the event is a call that an interrupt ended, or the answer to one. The SDK's runner must not see them: it
   * would run the call, and count it as outstanding for ever when its answer is refused.
   */
  isSettled(event: SessionEvent): boolean {
    const answered = answeredId(event);
    return (
      ("id" in event && this.interrupted.has(event.id)) || (answered !== undefined && this.interrupted.has(answered))
    );
  }

  #noteStatus(event: SessionEvent): void {
    switch (event.type) {
      case "session.status_idle": {
        const reason = event.stop_reason;
        const waits = reason?.type === "requires_action";
        this.#turn = waits ? "requires_action" : "ended";
        this.#awaited = new Set(waits ? reason.event_ids : []);
        this.#hasNewInput = false;
        return;
      }
      case "session.status_running":
      case "session.status_rescheduled":
        this.#turn = "running";
        return;
      case "session.status_terminated":
      case "session.deleted":
        this.#turn = "ended";
        this.#hasNewInput = false;
        return;
      case "session.thread_status_terminated":
        this.#primary ??= event.session_thread_id;
        for (const calls of [this.open, this.#held]) {
          for (const call of calls.values()) if (call.threadId === event.session_thread_id) calls.delete(call.id);
        }
        return;
      case "session.thread_status_running":
      case "session.thread_status_idle":
      case "session.thread_status_rescheduled":
        this.#primary ??= event.session_thread_id; // a log's first is the primary's (SDK)
        return;
    }
    if (event.type.startsWith("user.") && event.type !== "user.tool_confirmation") {
      const answered = answeredId(event);
      const isKnown = answered !== undefined && (this.interrupted.has(answered) || this.#settled.has(answered));
      this.#hasNewInput ||= !isKnown;
    }
  }

  #noteCall(event: SessionEvent): void {
    switch (event.type) {
      case "agent.tool_use":
      case "agent.custom_tool_use": {
        const isCustom = event.type === "agent.custom_tool_use";
        const permission = event.type === "agent.tool_use" ? (event.evaluated_permission ?? "allow") : "allow";
        const call = { id: event.id, name: event.name, threadId: event.session_thread_id ?? undefined, isCustom };
        if (!this.answered.has(call.id) && permission !== "deny") {
          (permission === "allow" ? this.open : this.#held).set(call.id, call);
        }
        return;
      }
      case "user.tool_confirmation": {
        const held = this.#held.get(event.tool_use_id);
        this.#held.delete(event.tool_use_id);
        if (held !== undefined && event.result === "allow") this.open.set(held.id, held);
        return;
      }
      case "user.interrupt":
        for (const calls of [this.open, this.#held]) {
          for (const call of calls.values()) {
            if (event.session_thread_id == null || event.session_thread_id === (call.threadId ?? this.#primary)) {
              calls.delete(call.id);
              this.interrupted.set(call.id, call);
            }
          }
        }
        return;
    }
    const answered = answeredId(event);
    if (answered !== undefined) {
      this.answered.add(answered);
      this.open.delete(answered);
    }
  }
}

/** The call that a result answers. */
export function answeredId(event: SessionEvent | ResultEvent): string | undefined {
  switch (event.type) {
    case "user.custom_tool_result":
      return event.custom_tool_use_id;
    case "user.tool_result":
    case "agent.tool_result":
      return event.tool_use_id;
    default:
      return undefined;
  }
}

/** The whole log. Throws the SDK's errors. */
export async function readLog(
  api: Anthropic,
  sessionId: string,
  log = new EventLog(),
  signal?: AbortSignal,
): Promise<EventLog> {
  for await (const event of api.beta.sessions.events.list(sessionId, { limit: PAGE }, { signal })) log.note(event);
  log.readings += 1;
  return log;
}

/** The log's last page: enough to know whether a turn is over. Throws the SDK's errors. */
export async function recentLog(
  api: Anthropic,
  sessionId: string,
  settled: ReadonlyMap<string, Call>,
  signal?: AbortSignal,
): Promise<EventLog> {
  const log = new EventLog(settled);
  const page = await api.beta.sessions.events.list(sessionId, { order: "desc", limit: RECENT_EVENTS }, { signal });
  for (const event of page.data.toReversed()) log.note(event);
  return log;
}

/** True when the session is gone, or idle at the end of a turn with nothing new in its log. Throws the SDK's errors. */
export async function turnIsOver(
  api: Anthropic,
  sessionId: string,
  settled: ReadonlyMap<string, Call>,
): Promise<boolean> {
  try {
    const session = await api.beta.sessions.retrieve(sessionId);
    if (session.status === "terminated") return true;
    return session.status === "idle" && (await recentLog(api, sessionId, settled)).isOver;
  } catch (error) {
    if (isStatus(error, 404)) return true;
    throw error;
  }
}
