/**
 * From the queue to running sandboxes: reserve, launch, and never ack (P2, R7, R8).
 *
 * The item stays un-acked until a loaded runner acks it, so a launch that fails anywhere loses nothing: the queue offers the
 * item again by itself once RECLAIM_MS have passed. That is also why no foreign poller may share the environment: one with
 * a shorter reclaim window would be handed items that are being launched here.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaSelfHostedWork } from "@anthropic-ai/sdk/resources/beta/environments/work";
import { apiError, errorLabel, isStatus, MAX_RETRIES, openClient } from "./api.ts";
import { JobRefused, LaunchFailed } from "./errors.ts";
import { Healer } from "./healing.ts";
import { type Job, jobFrom } from "./jobs.ts";
import { errorName, log } from "./log.ts";
import type { Settings } from "./settings.ts";
import type { WebhookEvent } from "./webhook.ts";

export const RECLAIM_MS = 120_000;
const LAUNCH_MS = 90_000; // from hand-out; below RECLAIM_MS, so that an item is never launched twice at once
const DRAIN_MS = 240_000; // one drain polls no longer than this; the next signal or sweep goes on
const POLL_ATTEMPTS = 3;
const FIRST_PAUSE_MS = 500; // between two attempts, doubled each time
const LONGEST_PAUSE_MS = 8_000;
const TIMEOUT_MS = 30_000;
const LATE = "no runner was ready in time";
const HEALTHCHECKS = new Set(["healthcheck", "health_check"]);

/** What a runner finds in its working directory: path relative to it -> content. */
export type LaunchFiles = ReadonlyMap<string, Uint8Array>;

/** The compute side. */
export interface Provider {
  readonly name: string;
  /** Has the session's sandbox take the files and start a runner with this job. Idempotent. Throws `LaunchFailed`. */
  launch(job: Job, files: LaunchFiles): Promise<{ sandbox: string; outcome: "ready" | "served_already" }>;
}

/** What a dispatcher is made of. */
export interface DispatcherParts {
  readonly settings: Settings;
  readonly provider: Provider;
  readonly live: LiveSessions;
  /** One a process, as the API documents it. */
  readonly workerId: string;
  /** The names of the custom tools that a runner here answers, for healing. */
  readonly ownTools?: ReadonlySet<string>;
  /** Brings files for a session (R12). Never throws for what cannot be had. */
  readonly stage?: (job: Job, client: Anthropic) => Promise<LaunchFiles>;
  /** Other times than a real host has, for tests. */
  readonly timing?: { readonly drainMs?: number; readonly launchMs?: number; readonly firstPauseMs?: number };
}

/** The sessions whose sandboxes run, as far as this host knows; kept where it survives the host. */
export interface LiveSessions {
  count(): number;
  has(sessionId: string): boolean;
  add(sessionId: string): void;
  /** Forgets those that are not in `sessionIds`. */
  retain(sessionIds: ReadonlySet<string>): void;
}

export class Dispatcher {
  readonly #client: Anthropic;
  readonly #settings: Settings;
  readonly #provider: Provider;
  readonly #live: LiveSessions;
  readonly #healer: Healer;
  readonly #parts: DispatcherParts;
  readonly #drainMs: number;
  readonly #launchMs: number;
  readonly #firstPauseMs: number;
  #isSignalled = false;
  #draining: Promise<void> | undefined;
  readonly #launches = new Map<string, Promise<void>>(); // by session: one at a time for each
  #isFull = false;

  constructor(parts: DispatcherParts) {
    const { settings } = parts;
    this.#client = openClient(settings.environmentKey, settings.baseUrl, {
      maxRetries: MAX_RETRIES,
      timeout: TIMEOUT_MS,
    });
    this.#settings = settings;
    this.#provider = parts.provider;
    this.#live = parts.live;
    this.#parts = parts;
    this.#drainMs = parts.timing?.drainMs ?? DRAIN_MS;
    this.#launchMs = parts.timing?.launchMs ?? LAUNCH_MS;
    this.#firstPauseMs = parts.timing?.firstPauseMs ?? FIRST_PAUSE_MS;
    this.#healer = new Healer(this.#client, settings.environmentId, parts.ownTools);
  }

  /** Says that there may be work, and returns at once. A signal during a drain makes it poll once more. */
  wake(): void {
    this.#isSignalled = true;
    this.#draining ??= this.#drain()
      .catch((error: unknown) => log.error("drain", { error, reason: text(error) })) // a bug: loudly
      .finally(() => {
        this.#draining = undefined;
        if (this.#isSignalled) this.wake(); // it came after the last poll
      });
  }

  /** Takes a webhook that tells of no work, but of a session that may be stranded: the next sweeps look at it first (R9). */
  suspect(event: Pick<WebhookEvent, "sessionId">): void {
    this.#healer.hint(event.sessionId);
  }

  /** Polls until the queue is empty and waits for the launches that came of it. */
  async drain(): Promise<void> {
    this.wake();
    await this.#draining;
    await Promise.all(this.#launches.values());
  }

  /** A sandbox has ended: work that waited because there was no room goes on. */
  roomMade(): void {
    if (this.#isFull) this.wake();
  }

  /** What must happen even when no webhook ever arrives (P1): drain and heal. Run it each minute. */
  async sweep(): Promise<void> {
    const began = Date.now();
    await this.drain();
    const list = await this.#healer.listWork();
    if (list !== undefined) {
      const served = list.items.filter((item) => item.state !== "stopped").map((item) => item.data.id);
      this.#live.retain(new Set([...served, ...this.#launches.keys()]));
      if ((await this.#healer.heal(list)) > 0) await this.drain();
    }
    log.info("sweep", { provider: this.#provider.name, ms: Date.now() - began });
  }

  async #drain(): Promise<void> {
    const deadline = Date.now() + this.#drainMs;
    while (this.#isSignalled) {
      // A slot before the poll, so that nothing waits reserved (P8).
      while (this.#launches.size >= this.#settings.launchConcurrency) await Promise.race(this.#launches.values());
      this.#isSignalled = false; // before the poll: a signal after it must not be lost
      if (!this.#hasRoom() || Date.now() > deadline) return;
      const item = await this.#poll();
      if (item === undefined) continue;
      this.#isSignalled = true;
      this.#begin(item);
    }
  }

  /** The next item, or undefined when the queue is empty or will not answer now; the sweep comes back to it. */
  async #poll(): Promise<BetaSelfHostedWork | undefined> {
    for (let attempt = 1; attempt <= POLL_ATTEMPTS; attempt += 1) {
      if (attempt > 1) await this.#pause(attempt - 1);
      try {
        const item: unknown = await this.#client.beta.environments.work.poll(
          this.#settings.environmentId,
          { reclaim_older_than_ms: RECLAIM_MS, "Anthropic-Worker-ID": this.#parts.workerId },
          { maxRetries: 0 },
        );
        return isItem(item) ? item : undefined;
      } catch (error) {
        apiError(error);
        if (isStatus(error, 429)) {
          log.warning("poll", {
            error: errorLabel(error),
            reason: "the API asks to slow down; the next sweep goes on",
          });
          return undefined;
        }
        if (isStatus(error, 401, 403)) {
          const reason =
            "the environment key is not accepted: check ANTHROPIC_ENVIRONMENT_KEY and ANTHROPIC_ENVIRONMENT_ID";
          log.error("poll", { error: errorLabel(error), reason });
          return undefined;
        }
        log.warning("poll", { attempt, error: errorLabel(error) });
      }
    }
    return undefined;
  }

  /** Whether one more sandbox may run (SANDBOX_MAX_LIVE). */
  #hasRoom(): boolean {
    const starting = [...this.#launches.keys()].filter((sessionId) => !this.#live.has(sessionId));
    const live = this.#live.count() + starting.length;
    const wasFull = this.#isFull;
    this.#isFull = live >= this.#settings.maxLive;
    if (this.#isFull && !wasFull) {
      const reason = `${live} sandboxes run and SANDBOX_MAX_LIVE is ${this.#settings.maxLive}; work waits in the queue`;
      log.warning("full", { provider: this.#provider.name, reason });
    }
    return !this.#isFull;
  }

  /** Starts the launch of a reserved item. */
  #begin(item: BetaSelfHostedWork): void {
    const sessionId = String(item.data?.id ?? item.id);
    if (this.#launches.has(sessionId)) return; // handed out again while its launch is still under way here
    const launch = this.#launch(item)
      .catch((error: unknown) =>
        log.error("launch_failed", { session: sessionId, work: item.id, error, reason: text(error) }),
      )
      .finally(() => this.#launches.delete(sessionId));
    this.#launches.set(sessionId, launch);
  }

  async #launch(item: BetaSelfHostedWork): Promise<void> {
    const began = Date.now();
    const kind: string | undefined = item.data?.type;
    if (kind !== undefined && HEALTHCHECKS.has(kind)) return this.#stopHealthcheck(item);
    let job: Job;
    try {
      if (kind !== "session") throw new JobRefused("the item is no session");
      job = jobFrom(item, this.#settings);
    } catch (error) {
      if (!(error instanceof JobRefused)) throw error;
      log.error("refused", { work: item.id, reason: error.message });
      return;
    }
    const names = { provider: this.#provider.name, session: job.sessionId, work: job.workId };
    const staging = this.#settings.stageFiles ? this.#parts.stage?.(job, this.#client) : undefined;
    for (let attempt = 1; ; attempt += 1) {
      try {
        const files = (await staging) ?? new Map();
        const left = began + this.#launchMs - Date.now();
        if (left <= 0) throw new LaunchFailed(LATE, { retriable: false });
        const { sandbox, outcome } = await within(left, this.#provider.launch(job, files));
        this.#live.add(job.sessionId);
        const action = outcome === "ready" ? "launched" : "served_already";
        log.info(action, { ...names, sandbox, attempt, ms: Date.now() - began });
        return;
      } catch (error) {
        if (!(error instanceof LaunchFailed)) throw error;
        log.warning("launch_failed", { ...names, attempt, ms: Date.now() - began, reason: error.message });
        if (!error.retriable) return;
      }
      await this.#pause(attempt);
    }
  }

  #pause(attempt: number): Promise<void> {
    const ms = Math.min(this.#firstPauseMs * 2 ** (attempt - 1), LONGEST_PAUSE_MS);
    return new Promise((resolve) => setTimeout(resolve, ms));
  }

  /** The queue also sends items to see that a worker answers. The SDK's worker stops them too. */
  async #stopHealthcheck(item: BetaSelfHostedWork): Promise<void> {
    const { work } = this.#client.beta.environments;
    const environment_id = this.#settings.environmentId;
    try {
      await work.ack(item.id, { environment_id });
      await work.stop(item.id, { environment_id, force: true });
      log.info("healthcheck", { work: item.id });
    } catch (error) {
      log.warning("healthcheck", { work: item.id, error: errorLabel(apiError(error)) });
    }
  }
}

/** The SDK checks no shapes: `{}` comes as an item without an id, a proxy's page as its text. */
function isItem(value: unknown): value is BetaSelfHostedWork {
  return (
    typeof value === "object" && value !== null && "id" in value && typeof value.id === "string" && value.id !== ""
  );
}

/** What `work` comes to, unless it takes longer: the item then stays un-acked and is offered again. */
async function within<T>(ms: number, work: Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | null = null;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new LaunchFailed(LATE, { retriable: false })), ms);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** A mistake of ours is logged with its message and place, redacted like everything else. */
function text(error: unknown): string {
  return error instanceof Error ? (error.stack ?? errorName(error)) : String(error);
}
