/**
 * The lease of one work item (R1, R2, R4): heartbeats on the condition of our own last one, and a fenced stop.
 *
 * The record is saved before and after each beat, so a runner that lost its memory goes on with the lease it has, and
 * knows of a beat whose answer it never saw.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { APIError } from "@anthropic-ai/sdk";
import type { BetaSelfHostedWorkHeartbeatResponse } from "@anthropic-ai/sdk/resources/beta/environments/work";
import { apiError, CALL_TIMEOUT_MS, isStatus, openClient, statusOf } from "./api.ts";
import type { Job } from "./jobs.ts";

export const NO_HEARTBEAT = "NO_HEARTBEAT";
export const REFUSED = [401, 403, 404]; // the credential or the item is gone: no later request will fare better
const UNDECIDED = [408, 409, 429]; // of the 4xx, those worth another attempt
const CANNOT_MATCH = "2000-01-01T00:00:00.000000Z"; // no live item has this heartbeat
const DEFAULT_TTL_SECONDS = 300; // until the server's first answer; its own default
const FRESH_MARGIN_SECONDS = 60; // no call starts in the last minute of a lease (R5)
const LONGEST_BEAT_SECONDS = 30; // the SDK's longest pause between two heartbeats
const RETRY_SECONDS = 2; // after a beat that was not answered
const STOP_ATTEMPTS = 3;
const LOOK_MS = 250;

/** What is kept of a lease. Times are milliseconds since the epoch. */
export interface LeaseRecord {
  readonly lastHeartbeat: string | null;
  readonly ttlSeconds: number;
  /** When the last recorded beat was sent: the server's time to live began no earlier. */
  readonly beatenAt: number;
  /** When the first beat was sent whose answer was never seen: it may have been recorded (R2). */
  readonly unknownSince: number | null;
}

/** What the control plane says about the item: its state, and the last heartbeat it recorded. */
export interface LeaseState {
  readonly state: string;
  readonly lastHeartbeat: string | null;
}

/** Why a lease is over: another runner's, or to be stopped because the server says so. */
export type LeaseEnd = "lost" | "stopping";

export class Lease {
  readonly #api: Anthropic;
  readonly #job: Job;
  readonly #save: (record: LeaseRecord) => void;
  #record: LeaseRecord;
  readonly #over = new AbortController();
  #end: LeaseEnd | undefined;
  #beating: Promise<boolean> | undefined;
  #triedAt: number;
  isStopped = false;
  #stopSent = false;

  /** `record` is what `save` kept last, by this runner or by one before it; undefined when nothing was claimed yet. */
  constructor(job: Job, record: LeaseRecord | undefined, save: (record: LeaseRecord) => void) {
    this.#api = openClient(job.token, job.baseUrl, { maxRetries: 0, timeout: CALL_TIMEOUT_MS });
    this.#job = job;
    this.#save = save;
    this.#record = record ?? {
      lastHeartbeat: null,
      ttlSeconds: DEFAULT_TTL_SECONDS,
      beatenAt: Date.now(),
      unknownSince: null,
    };
    this.#triedAt = this.#record.unknownSince ?? this.#record.beatenAt;
  }

  /** Aborted once the lease is over. */
  get over(): AbortSignal {
    return this.#over.signal;
  }

  get end(): LeaseEnd | undefined {
    return this.#end;
  }

  get lastHeartbeat(): string | null {
    return this.#record.lastHeartbeat;
  }

  /** The first beat was answered: the item is ours. */
  get isClaimed(): boolean {
    return this.#record.lastHeartbeat !== null;
  }

  /** True while a tool may start: the lease will surely outlive the start (R5). */
  get isFresh(): boolean {
    const margin = Math.min(FRESH_MARGIN_SECONDS, this.#record.ttlSeconds / 2);
    return this.#end === undefined && !this.#stopSent && this.#ageSeconds < this.#record.ttlSeconds - margin;
  }

  /**
   * A stop of ours, at the end of a turn, may have been recorded, whether its answer was seen or not: what the server calls
   * stopped since then is no operator's doing.
   */
  get isStopOurs(): boolean {
    return this.#stopSent;
  }

  /** When the next beat is due, in milliseconds from now; sooner after one that was not answered. */
  get beatInMs(): number {
    const pause = this.#record.unknownSince === null ? LONGEST_BEAT_SECONDS : RETRY_SECONDS;
    return this.#triedAt + Math.max(1, Math.min(this.#record.ttlSeconds / 2, pause)) * 1000 - Date.now();
  }

  /** Also while a beat was on its way: its answer is then of no use, and the record may be another runner's. */
  get #isOver(): boolean {
    return this.#end !== undefined;
  }

  get #ageSeconds(): number {
    return (Date.now() - this.#record.beatenAt) / 1000;
  }

  /** Returns once a tool may start, or once the lease or `signal` is over. */
  async waitFresh(signal: AbortSignal): Promise<void> {
    while (!this.isFresh && this.#end === undefined && !signal.aborted) {
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
    }
  }

  /** Acks the item; decides nothing unless it is refused for good. Throws the SDK's errors. */
  async ack(): Promise<void> {
    await this.#api.beta.environments.work.ack(this.#job.workId, { environment_id: this.#job.environmentId });
  }

  /**
   * A beat on the condition that the last recorded one is ours; the claim when there is none yet. True: it counts. One at a
   * time, because of two with the same condition the second one loses.
   */
  beat(): Promise<boolean> {
    this.#beating ??= this.#beat().finally(() => {
      this.#beating = undefined;
    });
    return this.#beating;
  }

  async #beat(): Promise<boolean> {
    if (this.#isOver) return false;
    const sentAt = Date.now();
    const before = this.#record.unknownSince;
    this.#triedAt = sentAt;
    this.#keep({ ...this.#record, unknownSince: before ?? sentAt });
    let answer: BetaSelfHostedWorkHeartbeatResponse;
    try {
      answer = await this.#send(this.#record.lastHeartbeat ?? NO_HEARTBEAT);
    } catch (error) {
      const refusal = apiError(error);
      return this.#isOver ? false : this.#noteRefusal(refusal, before);
    }
    return this.#isOver ? false : this.#note(answer, sentAt, before);
  }

  /** Asks for the item's lease without touching it, with a heartbeat whose condition cannot hold (R3). */
  async probe(): Promise<LeaseState | undefined> {
    try {
      const answer = await this.#send(CANNOT_MATCH);
      return { state: answer.state, lastHeartbeat: answer.last_heartbeat || null };
    } catch (error) {
      if (isStatus(error, 412)) return leaseState(apiError(error));
      // A queued item has no lease to compare with, and a server may say so this way instead.
      if (isStatus(error, 404, 409)) return { state: "queued", lastHeartbeat: null };
      apiError(error);
      return undefined;
    }
  }

  /** Takes a recorded beat over as our own: nobody else can have sent it. The next beat proves it. */
  adopt(lastHeartbeat: string): void {
    this.#keep({ ...this.#record, lastHeartbeat, beatenAt: Date.now(), unknownSince: null });
  }

  /**
   * Our own stop, fenced right before it (P10). True when the item is stopped. Each attempt has its own fence: the
   * SDK would repeat a stop that met a 409, and by then the item may be queued again, for somebody else.
   */
  async stop(): Promise<boolean> {
    for (let attempt = 0; attempt < STOP_ATTEMPTS && !this.isStopped; attempt += 1) {
      if (!(await this.#mayStop())) continue;
      try {
        const { workId, environmentId } = this.#job;
        this.#stopSent ||= this.#end === undefined;
        await this.#api.beta.environments.work.stop(workId, { environment_id: environmentId, force: true });
        this.isStopped = true;
      } catch (error) {
        this.isStopped = isStatus(apiError(error), 409);
      }
    }
    if (this.#stopSent && !this.isStopped) await this.#mayStop(); // tells what became of the last one
    return this.isStopped;
  }

  /** The fence before a stop: a beat of ours, or what the item is once the server has spoken of a stop. */
  async #mayStop(): Promise<boolean> {
    if (this.#end === undefined && (await this.beat())) return true;
    if (this.#end !== "stopping") return false;
    // The server compares nothing then. Somebody else may have completed that stop, and what came since has queued the
    // session again: such an item is not ours to stop.
    const current = await this.probe();
    if (current === undefined) return false;
    this.isStopped = current.state === "stopped";
    if (!["starting", "active"].includes(current.state)) return current.state === "stopping";
    const isOurs = current.lastHeartbeat === this.#record.lastHeartbeat;
    if (!isOurs) this.#end = "lost";
    return isOurs;
  }

  /** Loses the lease once no beat was recorded for its whole time: the server may have given it away. */
  loseIfExpired(): void {
    if (this.#ageSeconds >= this.#record.ttlSeconds) this.#finish("lost");
  }

  #send(expected: string): Promise<BetaSelfHostedWorkHeartbeatResponse> {
    return this.#api.beta.environments.work.heartbeat(this.#job.workId, {
      environment_id: this.#job.environmentId,
      expected_last_heartbeat: expected,
    });
  }

  /** While an item is stopping the server compares nothing, so we do (P10). */
  #note(answer: BetaSelfHostedWorkHeartbeatResponse, sentAt: number, unknownBefore: number | null): boolean {
    if (!["stopping", "stopped"].includes(answer.state) && answer.lease_extended) {
      const ttlSeconds = answer.ttl_seconds || this.#record.ttlSeconds;
      this.#keep({ lastHeartbeat: answer.last_heartbeat, ttlSeconds, beatenAt: sentAt, unknownSince: null });
      this.#stopSent = false;
      return true;
    }
    this.#stopSent &&= answer.state === "stopped"; // ours is by force
    const isTheirs = !["", null, this.#record.lastHeartbeat].includes(answer.last_heartbeat);
    this.#finish(isTheirs && unknownBefore === null ? "lost" : "stopping");
    return false;
  }

  #noteRefusal(error: APIError, unknownBefore: number | null): boolean {
    const status = statusOf(error);
    if (status === undefined || status >= 500 || status === 408) return false; // it may have been recorded
    this.#keep({ ...this.#record, unknownSince: unknownBefore });
    if (status === 412) {
      const current = leaseState(error);
      // After a beat with an unknown outcome a 412 is ambiguous. While our lease lives nobody else can have claimed it, so
      // the value the server has is that beat. Of an unknown first claim claim.ts decides.
      const isAlive = this.#ageSeconds < this.#record.ttlSeconds;
      if (this.isClaimed && unknownBefore !== null && isAlive && current.state === "active" && current.lastHeartbeat) {
        this.#keep({
          ...this.#record,
          lastHeartbeat: current.lastHeartbeat,
          beatenAt: unknownBefore,
          unknownSince: null,
        });
        this.#stopSent = false;
        return true;
      }
      if (this.isClaimed || unknownBefore === null) this.#finish("lost");
    } else if (!UNDECIDED.includes(status)) {
      this.#finish("lost");
    }
    return false;
  }

  #keep(record: LeaseRecord): void {
    this.#record = record;
    this.#save(record);
  }

  #finish(end: LeaseEnd): void {
    this.#end ??= end;
    this.#over.abort();
  }
}

/** `error.details.current_state` of a 412, as far as it is there. */
export function leaseState(error: APIError): LeaseState {
  let node: unknown = error.error;
  for (const key of ["error", "details", "current_state"]) node = record(node)[key];
  const { state, last_heartbeat: last } = record(node);
  return { state: String(state ?? "unknown"), lastHeartbeat: typeof last === "string" && last !== "" ? last : null };
}

function record(value: unknown): Record<string, unknown> {
  return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : {};
}
