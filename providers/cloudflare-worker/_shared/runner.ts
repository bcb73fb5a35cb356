/**
 * One session under one lease: claim, serve, leave (R1, R4).
 *
 * The SDK's tool runner does the serving. Around it stand the claim, the answers to what others left open, the question
 * whether the item may be stopped, and the look back after it. A runner can lose its memory at any await: what it must
 * know is in its store, and another one made from the same store goes on under the same lease. One file, since each step leans
 * on the order of all the others.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaRunnableTool } from "@anthropic-ai/sdk/lib/tools/BetaRunnableTool";
import type { BetaManagedAgentsSession } from "@anthropic-ai/sdk/resources/beta/sessions/sessions";
import { Answers } from "./answers.ts";
import { apiError, errorLabel, MAX_RETRIES, openClient } from "./api.ts";
import { ackAndClaim } from "./claim.ts";
import { NotOurs, SetupFailed } from "./errors.ts";
import { answeredId, EventLog, errorResult, OWNED_TOOLS, type ResultEvent, readLog, turnIsOver } from "./events.ts";
import { Guard, type Journal, LOST, type OwnTool, resultOf } from "./guard.ts";
import { hearing, type ResultFate } from "./hearing.ts";
import type { Job } from "./jobs.ts";
import { Lease, type LeaseRecord } from "./lease.ts";
import type { Emit } from "./log.ts";

const TIMEOUT_MS = 60_000;
const SETUP_ATTEMPTS = 3;
const SETUP_PAUSE_MS = 2_000;
const LONGEST_PAUSE_MS = 30_000;
const LONGEST_LOOK_MS = 5_000;
const SETTLE_CALLS_MS = 30_000; // for the answers at the start; far below the lease
const LOOK_BACK_MS = 5_000; // after our stop at the end of a turn, while a last message is still thought about

/** Exit codes, as of every runner. */
export const EXIT = { ok: 0, leaseLost: 76, handedOver: 143 } as const;

export interface Exit {
  readonly code: (typeof EXIT)[keyof typeof EXIT];
  readonly reason: string;
}

/** What the runner keeps where it survives the runner. */
export interface RunnerStore {
  lease(): LeaseRecord | undefined;
  saveLease(record: LeaseRecord): void;
  readonly journal: Journal;
}

/** What the sandbox brings along. */
export interface Hands {
  /** Called before each pass, with the client that holds the session's token. `SetupFailed` and the SDK's errors are tried again. */
  setUp(session: BetaManagedAgentsSession, api: Anthropic): Promise<void>;
  /** Saves what the session's agent shares with others (memory stores); at the end with `isFinal`. Never throws. */
  sync(isFinal: boolean): Promise<void>;
  readonly tools: readonly OwnTool[];
  readonly customTools: readonly BetaRunnableTool[];
}

export class Runner {
  readonly lease: Lease;
  readonly #job: Job;
  readonly #pauseMs: number;
  readonly #hands: Hands;
  readonly #emit: Emit;
  readonly #wasTried: boolean;
  readonly #log = new EventLog();
  readonly #leaving = new AbortController();
  readonly #over = new AbortController();
  readonly #client: Anthropic;
  readonly #api: Anthropic;
  readonly #answers: Answers;
  readonly #guard: Guard;
  readonly #journal: Journal;
  readonly #customTools: ReadonlySet<string>;
  readonly #owned: ReadonlySet<string>;
  readonly #heldBack: ResultEvent[] = [];
  /** Aborted when the SDK's runner of this pass ends. */
  #passOver: AbortSignal = new AbortController().signal;
  #phase: "loading" | "claimed" | "leaving" = "loading";
  #isSetUp = false;
  /** Aborted once nothing has happened for long in a session that only waits; and for what it waited then. */
  #patience = new AbortController();
  #waitedFor = "";

  /** `pauseMs`: between two attempts to set up; another one for tests. */
  constructor(job: Job, store: RunnerStore, hands: Hands, emit: Emit, pauseMs = SETUP_PAUSE_MS) {
    this.#pauseMs = pauseMs;
    const record = store.lease();
    this.#job = job;
    this.#hands = hands;
    this.#emit = emit;
    this.#journal = store.journal;
    this.#wasTried = record?.unknownSince != null;
    this.lease = new Lease(job, record, (changed) => store.saveLease(changed));
    if (this.lease.isClaimed) this.#phase = "claimed";
    abortWith(this.#over, this.#leaving.signal, this.lease.over);
    this.#guard = new Guard({
      lease: this.lease,
      log: this.#log,
      journal: store.journal,
      signal: this.#over.signal,
      emit,
    });
    this.#customTools = new Set(hands.customTools.map((tool) => tool.name));
    this.#owned = new Set([...OWNED_TOOLS, ...this.#customTools]);
    const options = { maxRetries: MAX_RETRIES, timeout: TIMEOUT_MS };
    this.#api = openClient(job.token, job.baseUrl, options);
    const heard = hearing({
      log: this.#log,
      fate: () => this.#fate(),
      hold: (events) => this.#heldBack.push(...events),
      over: () => this.#passOver,
    });
    this.#client = openClient(job.token, job.baseUrl, { ...options, middleware: [heard] });
    this.#answers = new Answers(this.#api, job.sessionId, emit);
  }

  /** Whether it serves and means to go on. A newcomer asks (R3). */
  get isServing(): boolean {
    return this.#phase === "claimed";
  }

  get isLoading(): boolean {
    return this.#phase === "loading";
  }

  /** Makes room for another runner of the session: the item was queued again, so this one serves nobody. */
  leave(): void {
    this.#leaving.abort();
  }

  /** From the ack to the exit. */
  async run(): Promise<Exit> {
    const began = Date.now();
    if (!this.lease.isClaimed) {
      try {
        await ackAndClaim(this.lease, this.#wasTried, this.#over.signal);
      } catch (error) {
        if (!(error instanceof NotOurs)) throw error;
        return this.#leaving.signal.aborted ? this.#handedOver() : { code: EXIT.leaseLost, reason: error.message };
      }
    }
    const isResumed = this.#phase === "claimed";
    this.#phase = "claimed";
    this.#emit(isResumed ? "resumed" : "claimed", { ms: Date.now() - began });
    const watching = setInterval(
      () => this.#watch(),
      Math.min(LONGEST_LOOK_MS, Math.min(this.#job.maxIdleSeconds, this.#job.maxWaitSeconds) * 250 + 50),
    );
    try {
      return await this.#serve();
    } finally {
      clearInterval(watching);
    }
  }

  async #serve(): Promise<Exit> {
    await unless(this.#over.signal, SETTLE_CALLS_MS, (signal) =>
      this.#answers.settlePredecessors(this.#log, this.#customTools, this.#journal, signal),
    );
    let failures = 0;
    while (!this.#over.signal.aborted) {
      const began = Date.now();
      let failure = await this.#pass();
      if (this.#over.signal.aborted) break;
      this.#phase = "leaving";
      await this.#hands.sync(true);
      if ((await this.#hasNothingToDo()) && (await this.lease.stop())) break;
      this.#phase = "claimed";
      if (this.#patience.signal.aborted) {
        this.#patience = new AbortController(); // it turned out not to wait, or could not be left
        this.#log.touch();
        continue;
      }
      // The SDK returns for idleness no sooner than this; sooner, it had trouble, and need not have thrown.
      if (this.#isSetUp && Date.now() - began >= Math.max(this.#job.maxIdleSeconds * 1000, this.#pauseMs)) {
        failures = 0;
        if (failure === undefined) continue; // new input came between the idle decision and the stop
      }
      failure ??= "EndedEarly";
      failures += 1;
      this.#emit("retry", { error: failure, attempt: failures });
      if (failures >= SETUP_ATTEMPTS && (await this.#giveUp(failure))) {
        return { code: EXIT.ok, reason: `set-up failed ${failures} times (${failure}); the agent was told` };
      }
      await this.#pause(Math.min(this.#pauseMs * failures, LONGEST_PAUSE_MS));
    }
    return this.#leave();
  }

  /** One pass of the SDK's runner. Returns the name of what ended it, if something did. */
  async #pass(): Promise<string | undefined> {
    const tools = [
      ...this.#hands.tools.map((tool) => this.#guard.own(tool)),
      ...this.#hands.customTools.map((tool) => this.#guard.custom(tool)),
    ];
    this.#isSetUp = false;
    try {
      await this.#hands.setUp(await this.#api.beta.sessions.retrieve(this.#job.sessionId), this.#api);
      this.#isSetUp = true;
      const pass = new AbortController();
      abortWith(pass, this.#over.signal, this.#patience.signal);
      const maxIdleMs = Math.max(1, this.#job.maxIdleSeconds * 1000); // 0 would mean "for ever" to the SDK
      const runner = this.#client.beta.sessions.events.toolRunner(this.#job.sessionId, {
        tools,
        maxIdleMs,
        signal: pass.signal,
      });
      this.#passOver = runner.signal;
      for await (const call of runner) {
        if (call.posted && this.#fate() === "send") this.#journal.forget(call.toolUseId);
        await this.#hands.sync(false);
      }
      return undefined;
    } catch (error) {
      return error instanceof SetupFailed ? error.message : errorLabel(apiError(error));
    }
  }

  /** P10: never stop what still has work. */
  async #hasNothingToDo(): Promise<boolean> {
    try {
      if (await turnIsOver(this.#api, this.#job.sessionId, this.#log.interrupted)) return true;
      if (!this.#patience.signal.aborted) return false;
      const log = await readLog(this.#api, this.#job.sessionId);
      return log.onlyWaits(this.#owned) && log.waitsFor === this.#waitedFor;
    } catch (error) {
      apiError(error);
      return false;
    }
  }

  async #leave(): Promise<Exit> {
    if (this.lease.end === "lost") return { code: EXIT.leaseLost, reason: "the lease was lost" };
    if (this.#leaving.signal.aborted) return this.#handedOver();
    if (this.lease.end === "stopping") {
      await this.#hands.sync(true);
      await this.lease.stop();
      if (this.#fate() === "drop") return { code: EXIT.leaseLost, reason: "the lease was lost" };
      // Stopped first: an answer to a session without a live item queues it again, for the next runner.
      await this.#answers.send([...this.#heldBack, ...this.#unposted()]);
      if (!this.lease.isStopOurs) return { code: EXIT.ok, reason: "stopped by the operator" };
    }
    await unless(this.#leaving.signal, LOOK_BACK_MS, (signal) =>
      this.#answers.lookBack(this.lease, this.#owned, this.#log.interrupted, signal),
    );
    return { code: EXIT.ok, reason: this.#patience.signal.aborted ? "nobody else went on" : "the session is idle" };
  }

  /** The session cannot be set up here. Its agent is told why instead of waiting for ever. Stop first, as in `#leave`. */
  async #giveUp(failure: string): Promise<boolean> {
    let log: EventLog;
    try {
      log = await readLog(this.#api, this.#job.sessionId);
    } catch (error) {
      apiError(error);
      return false;
    }
    if (!(await this.lease.stop())) return false;
    await this.#answers.refuseAll(
      log,
      this.#customTools,
      `the sandbox could not be set up for this session (${failure}); nothing was run`,
    );
    return true;
  }

  /** What ran, here or in a runner before this one, and whose result is neither posted nor on its way. */
  #unposted(): ResultEvent[] {
    const onTheirWay = new Set(this.#heldBack.map((event) => answeredId(event)));
    return [...this.#log.open.values()].flatMap((call) => {
      const outcome = onTheirWay.has(call.id) ? undefined : this.#journal.find(call.id);
      if (outcome === undefined) return [];
      return [outcome === "begun" ? errorResult(call, LOST) : resultOf(call, outcome)];
    });
  }

  #handedOver(): Exit {
    this.#emit("handover");
    return { code: EXIT.handedOver, reason: "another runner of this session takes over" };
  }

  #fate(): ResultFate {
    if (this.lease.end === "lost" || this.#leaving.signal.aborted) return "drop";
    return this.lease.end === "stopping" ? "hold" : "send";
  }

  /** Ends a wait in which only somebody else can go on: what that one does queues the session again. */
  #watch(): void {
    this.lease.loseIfExpired();
    const waits = this.#log.readings > 0 && this.#guard.running === 0 && this.#log.onlyWaits(this.#owned);
    const { maxIdleSeconds, maxWaitSeconds } = this.#job;
    const seconds = this.#log.hasNotBegun ? Math.min(maxIdleSeconds, maxWaitSeconds) : maxWaitSeconds;
    if (waits && this.#log.quietSeconds >= seconds && !this.#patience.signal.aborted) {
      this.#waitedFor = this.#log.waitsFor;
      this.#patience.abort();
    }
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#over.signal.addEventListener(
        "abort",
        () => {
          clearTimeout(timer);
          resolve();
        },
        { once: true },
      );
    });
  }
}

/** Does `work` for so long, or until `end`. Its signal is aborted then, and what it is at is not waited for. */
async function unless(end: AbortSignal, ms: number, work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  const limit = new AbortController();
  const over = new Promise<void>((resolve) => limit.signal.addEventListener("abort", () => resolve(), { once: true }));
  abortWith(limit, end);
  const timer = setTimeout(() => limit.abort(), ms);
  try {
    await Promise.race([work(limit.signal), over]);
  } finally {
    clearTimeout(timer);
  }
}

/** Not `AbortSignal.any`: some runtimes collect what it returns while somebody waits for it. */
function abortWith(controller: AbortController, ...signals: AbortSignal[]): void {
  for (const signal of signals) {
    if (signal.aborted) controller.abort();
    else signal.addEventListener("abort", () => controller.abort(), { once: true });
  }
}
