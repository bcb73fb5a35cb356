/**
 * One session's sandbox: its files, and the runner that serves it. Cloudflare guarantees one object for a name, so there is
 * one sandbox for a session and never two runners.
 *
 * The platform may take the object out of memory at any await. Its alarm is what keeps a session going: it beats the lease
 * while a runner works, makes the runner again after an eviction, and deletes the files of a session that nobody used.
 */

import { DurableObject } from "cloudflare:workers";
import type { LaunchFiles } from "../_shared/dispatcher.ts";
import type { Job } from "../_shared/jobs.ts";
import { Lease } from "../_shared/lease.ts";
import { errorName, log, runnerLog } from "../_shared/log.ts";
import { type Exit, type Hands, Runner, type RunnerStore } from "../_shared/runner.ts";
import { patternOf, redact } from "../_shared/secrets.ts";
import { customTools } from "./custom_tools.ts";
import type { DispatcherObject } from "./dispatcher_object.ts";
import { type Entry, FileError, Files, WORKDIR } from "./files.ts";
import { Memory } from "./memory.ts";
import { installSkills } from "./skills.ts";
import { type Launch, State } from "./state.ts";
import { agentTools } from "./tools.ts";

const TICK_MS = 30_000; // far below the 70 s after which an object that gets no event may be evicted
const SHORTEST_TICK_MS = 500;
const CHALLENGE_MS = 60_000; // below the dispatcher's budget for a launch
const PROBE_MS = 1_000;
const MAX_CRASHES = 3;
const EXIT_CRASHED = 70;

/** All that an object gets of its Worker's bindings: in particular not the environment key (P5). */
export interface SessionEnv {
  DISPATCHER: DurableObjectNamespace<DispatcherObject>;
}

/** Name of the one dispatcher of a deployment. */
export const DISPATCHER_NAME = "dispatcher";

export class SessionObject extends DurableObject<SessionEnv> {
  readonly #state: State;
  #runner: Runner | undefined;
  #running: Promise<void> | undefined;
  #starting: Promise<unknown> = Promise.resolve();

  constructor(ctx: DurableObjectState, env: SessionEnv) {
    super(ctx, { DISPATCHER: env.DISPATCHER });
    this.#state = new State(ctx.storage);
  }

  /**
   * Has a runner serve the job. "ready": it is stored, and will be claimed even if the object is evicted now.
   * "served_already": a healthy runner serves the item. "busy": an older runner did not make room in time.
   */
  start(
    launch: Omit<Launch, "areSkillsBrought">,
    files: LaunchFiles = new Map(),
  ): Promise<"ready" | "served_already" | "busy"> {
    const areSkillsBrought = [...files.keys()].some((path) => path.startsWith("skills/"));
    const started = this.#starting.then(() => this.#start({ ...launch, areSkillsBrought }, files));
    this.#starting = started.catch(() => undefined); // the caller hears of it
    return started;
  }

  override async alarm(): Promise<void> {
    const launch = this.#state.exists() ? this.#state.launch() : undefined;
    if (launch === undefined) {
      const keptUntil = this.#state.exists() ? (this.#state.keptUntil() ?? 0) : 0;
      if (keptUntil > Date.now()) await this.ctx.storage.setAlarm(keptUntil);
      else await this.ctx.storage.deleteAll(); // nobody used these files for as long as they are kept
      return;
    }
    this.#ensureRunning(launch);
    const lease = this.#runner?.lease;
    if (lease?.isClaimed && lease.beatInMs <= SHORTEST_TICK_MS) await lease.beat();
    await this.#tickAgain();
  }

  /** The session's files by path; undefined when there is no such session here. */
  listFiles(): Entry[] | undefined {
    return this.#state.exists() ? [...this.#files(0).files("/")] : undefined;
  }

  /** A file's content; undefined when there is no such file. */
  readFile(path: string): Uint8Array | undefined {
    if (!this.#state.exists()) return undefined;
    try {
      return this.#files(0).read(path);
    } catch (error) {
      if (error instanceof FileError) return undefined;
      throw error;
    }
  }

  async #start(launch: Launch, files: LaunchFiles): Promise<"ready" | "served_already" | "busy"> {
    this.#state.create();
    this.#files(launch.maxFilesBytes).create();
    const before = this.#state.launch();
    if (before !== undefined) this.#ensureRunning(before);
    // Also where nothing is stored any more: that runner may be in its last step.
    const answer = await this.#challenge(launch.job);
    if (answer !== "free") return answer;
    this.#put(files, launch);
    this.#state.begin(launch);
    await this.ctx.storage.setAlarm(Date.now() + TICK_MS);
    this.#ensureRunning(launch);
    return "ready";
  }

  /** What the dispatcher brought, where there is room for it. */
  #put(brought: LaunchFiles, launch: Launch): void {
    const files = this.#files(launch.maxFilesBytes);
    for (const [path, content] of brought) {
      try {
        this.ctx.storage.transactionSync(() => files.write(`${WORKDIR}/${path}`, content));
      } catch (error) {
        if (!(error instanceof FileError)) throw error;
        log.warning("stage", { session: launch.job.sessionId, reason: `${path} is left out: ${error.message}` });
      }
    }
  }

  /**
   * Asks whether the runner there is serves the item (R3). "A runner works here" does not say so: only the control plane knows.
   * A queued item is served by nobody, whatever the runner believes.
   */
  async #challenge(job: Job): Promise<"free" | "served_already" | "busy"> {
    const asking = new Lease(job, undefined, () => undefined); // with the newcomer's token: the older one's may be void
    const until = Date.now() + CHALLENGE_MS;
    while (this.#running !== undefined && Date.now() < until) {
      const runner = this.#runner;
      if (runner?.isServing) {
        const lease = await asking.probe();
        if (lease?.state === "queued") runner.leave();
        const isOurs = lease?.lastHeartbeat === runner.lease.lastHeartbeat;
        if (runner.isServing && lease?.state === "active" && isOurs) return "served_already";
      }
      await Promise.race([this.#running, new Promise((resolve) => setTimeout(resolve, PROBE_MS))]);
    }
    return this.#running === undefined ? "free" : "busy";
  }

  #ensureRunning(launch: Launch): void {
    if (this.#running !== undefined) return;
    const emit = runnerLog(launch.job.sessionId, launch.job.token);
    const store: RunnerStore = {
      lease: () => this.#state.lease(),
      saveLease: (record) => {
        if (this.#runner !== runner) return; // a late answer, to a runner that has ended
        this.#state.saveLease(record);
        void this.#tickAgain(); // in the same transaction: the next beat is as sure as this one
      },
      journal: this.#state.journal,
    };
    const runner = new Runner(launch.job, store, this.#hands(launch), emit);
    this.#runner = runner;
    const ended = async (exit: Exit | { code: typeof EXIT_CRASHED; reason: string }): Promise<void> => {
      emit("exit", { ...exit });
      await this.#end(launch);
    };
    this.#running = runner
      .run()
      .then(ended, async (error: unknown) => {
        // A mistake of ours. The next alarm tries again; in the end the lease lapses and healing answers.
        const stack = error instanceof Error ? (error.stack ?? error.message) : String(error);
        const reason = redact(stack, patternOf(launch.job.token));
        log.error("runner", { session: launch.job.sessionId, error: errorName(error), reason });
        if (this.#state.noteCrash() >= MAX_CRASHES) await ended({ code: EXIT_CRASHED, reason: "it failed too often" });
        else await this.ctx.storage.setAlarm(Date.now() + TICK_MS);
      })
      .finally(() => {
        this.#running = undefined;
        this.#runner = undefined;
      });
    void this.#tickAgain();
  }

  /** The files stay for the next message, and no longer than they are kept. */
  async #end(launch: Launch): Promise<void> {
    this.#runner = undefined; // before all else: from here on it beats and saves no more
    const keptUntil = Date.now() + launch.retentionSeconds * 1000;
    this.#state.end(keptUntil);
    await this.ctx.storage.setAlarm(keptUntil);
    void this.#tellDispatcher(launch.job.sessionId); // the next runner need not wait for that
  }

  async #tellDispatcher(session: string): Promise<void> {
    try {
      await this.env.DISPATCHER.getByName(DISPATCHER_NAME).ended(session);
    } catch (error) {
      log.warning("ended", { session, error, reason: "the dispatcher learns it from its next sweep" });
    }
  }

  #hands(launch: Launch): Hands {
    const files = this.#files(launch.maxFilesBytes);
    const memory = new Memory(files, this.#state.baselines, launch.job.sessionId);
    return {
      tools: agentTools(files, () => memory.mounts),
      customTools: customTools(files),
      setUp: async (session, api) => {
        await installSkills(session, api, files, this.#state.skills, launch.areSkillsBrought);
        if (launch.job.isItemToken) await memory.mount(session, api); // the server refuses another token there
      },
      sync: (isFinal) => {
        if (!isFinal) this.#state.forgetCrashes(); // after a call that was answered
        return memory.sync(isFinal);
      },
    };
  }

  #files(maxBytes: number): Files {
    return new Files(this.ctx.storage.sql, maxBytes);
  }

  /** While there is a runner: the alarm after it is that of the end. */
  async #tickAgain(): Promise<void> {
    if (this.#runner === undefined) return;
    const { lease } = this.#runner;
    const inMs = lease.isClaimed ? Math.min(TICK_MS, Math.max(SHORTEST_TICK_MS, lease.beatInMs)) : TICK_MS;
    await this.ctx.storage.setAlarm(Date.now() + inMs);
  }
}
