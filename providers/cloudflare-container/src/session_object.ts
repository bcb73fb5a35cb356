/**
 * One session's sandbox: a container while somebody needs it, its files in R2 while nobody does. Cloudflare guarantees one
 * object for a name, and one container for an object.
 *
 * Whatever happens (a runner's end, a container's end, an alarm) leads to `#settle`, which looks at what is there and
 * decides what comes next. It remembers no more than `Session`, so it goes on where an object that was taken out of memory
 * left off. All of it happens in turn: no start meets a save. One file, so that every change of a session's state is seen at once.
 */

import { DurableObject } from "cloudflare:workers";
import { type LaunchFiles, RECLAIM_MS } from "../_shared/dispatcher.ts";
import { LaunchFailed } from "../_shared/errors.ts";
import { errorName, log, runnerLog } from "../_shared/log.ts";
import type { DispatcherObject } from "./dispatcher_object.ts";
import { hold } from "./egress.ts";
import { linesOf, readReady, sayIn } from "./runner_log.ts";
import { exitCode, Sandbox, SandboxRefused, type SandboxState, within } from "./sandbox.ts";
import { type Launch, newSession, type Options, type Session, type Started } from "./session.ts";
import { Workspaces } from "./workspaces.ts";

const TICK_MS = 15_000; // between two looks at a container that works
const START_MS = 80_000; // below the dispatcher's budget for a launch: a runner that starts later finds nobody who waits
const HELD_MS = RECLAIM_MS + 80_000; // until an item that was not acked is handed out again, and the sweep that finds it
const SILENT_MS = 300_000; // a container whose first process does not answer for so long is ended
const MAX_SAVES = 5; // attempts, of a container that fails
const SLOWEST_SAVE_MS = 300_000; // between two attempts: each takes twice the time of the one before
const OUTAGE_MS = 3_600_000; // for so long a container waits for a bucket that fails
const ERRORS = "inputs/ERRORS.txt"; // where the agent is told of what it was not brought, too
const SAVES_REFUSED = new Map([
  [413, 1], // it is too much, and stays so
  [422, 2], // the archiver failed, perhaps for want of memory
]);

/** All that an object gets of its Worker's bindings: in particular not the environment key (P5). */
export interface SessionEnv {
  DISPATCHER: DurableObjectNamespace<DispatcherObject>;
  /** Without it, the files of a session end with its container. */
  WORKSPACES?: R2Bucket;
}

/** Name of the one dispatcher of a deployment. */
export const DISPATCHER_NAME = "dispatcher";

export class SessionObject extends DurableObject<SessionEnv> {
  readonly #container: Container;
  readonly #workspaces: Workspaces | undefined;
  #turn: Promise<unknown> = Promise.resolve();
  #isWatched = false;
  #exit: string | undefined; // how the last container ended, in the platform's words
  #listener: symbol | undefined;

  constructor(ctx: DurableObjectState, env: SessionEnv) {
    const { DISPATCHER, WORKSPACES } = env;
    super(ctx, WORKSPACES === undefined ? { DISPATCHER } : { DISPATCHER, WORKSPACES });
    if (ctx.container === undefined) throw new Error("wrangler.jsonc gives SessionObject no container");
    this.#container = ctx.container;
    this.#workspaces = WORKSPACES === undefined ? undefined : new Workspaces(WORKSPACES);
  }

  /** Has a runner serve the job that `stdin` tells it, in the session's container, with the session's files and `files`. */
  start(sessionId: string, stdin: string, files: LaunchFiles, options: Options): Promise<Started> {
    const until = Date.now() + START_MS;
    return this.#inTurn(async () => {
      try {
        return {
          outcome: await this.#start({ sessionId, stdin, files, options }, until),
          reason: "",
          retriable: false,
        };
      } catch (error) {
        if (!(error instanceof LaunchFailed || error instanceof SandboxRefused)) throw error;
        return {
          outcome: "failed",
          reason: error.message,
          retriable: !(error instanceof LaunchFailed) || error.retriable,
        };
      }
    });
  }

  override async alarm(): Promise<void> {
    await this.ctx.storage.setAlarm(Date.now() + TICK_MS); // whatever becomes of this one, there is another
    await this.#inTurn(() => this.#settle());
  }

  async #start(launch: Launch, until: number): Promise<"ready" | "served_already"> {
    const session = { ...(this.#load() ?? newSession(launch.sessionId)), options: launch.options };
    const sandbox = await this.#awake(session);
    if (Date.now() > until) {
      Object.assign(session, { held: true, idleSince: Date.now() });
      this.#store(session);
      throw new LaunchFailed("the container took too long; the next hand-out finds it ready", { retriable: false });
    }
    Object.assign(session, { held: false, unsaved: true, failedSaves: 0, idleSince: undefined });
    this.#store(session);
    await this.ctx.storage.setAlarm(Date.now() + TICK_MS);
    const me = Symbol(session.id);
    this.#listener = me; // before the runner says anything: an older listener would say it too
    const answer = await sandbox.start(launch.stdin, told(launch.files, session.news)).catch((error: unknown) => {
      this.#listener = undefined;
      throw error;
    });
    session.news = "";
    this.#store(session);
    const lines = linesOf(answer.body);
    try {
      return await within(
        until - Date.now(),
        readReady(lines, (line) => sayIn(runnerLog(session.id), line)),
        new LaunchFailed("the runner was not ready in time", { retriable: false }),
      );
    } finally {
      this.ctx.waitUntil(this.#listen(session.id, lines, me));
    }
  }

  /** The session's sandbox with its files in it. Throws `LaunchFailed` and `SandboxRefused`. */
  async #awake(session: Session): Promise<Sandbox> {
    if (this.#container.running) {
      await this.#adopt(session);
      const sandbox = new Sandbox(this.#container, session.key);
      const state = await sandbox.state();
      if (state === undefined) throw new LaunchFailed("the session's container does not answer", { retriable: true });
      if (!state.stopping) return state.fresh ? await this.#filled(session, sandbox) : sandbox;
      if (state.runners > 0) {
        throw new LaunchFailed("the session's container is ending: its runner hands over", { retriable: true });
      }
      await this.#rest(session, state);
      if (session.phase === "awake") throw new LaunchFailed("the files are not saved yet", { retriable: true });
    } else if (session.phase === "awake") {
      await this.#lost(session);
    }
    return await this.#boot(session);
  }

  async #boot(session: Session): Promise<Sandbox> {
    const { egress } = session.options;
    Object.assign(session, { phase: "awake", key: crypto.randomUUID(), egress, held: true, unsaved: false });
    if (session.lost !== "") Object.assign(session, { news: session.lost, lost: "" });
    session.idleSince = session.silentSince = undefined; // it is idle from when it is seen to be, however long it takes
    this.#store(session);
    await this.ctx.storage.setAlarm(Date.now() + TICK_MS);
    await this.ctx.storage.sync(); // a container whose key was forgotten would answer nobody
    this.#exit = undefined;
    const sandbox = new Sandbox(this.#container, session.key);
    await this.#holdTo(session); // before there is anything to be held
    this.#container.start({ enableInternet: egress === undefined });
    this.#watch();
    await sandbox.answers(() => this.#exit);
    return await this.#filled(session, sandbox);
  }

  /** A sandbox that could not be filled is ended: half of its files may be there. */
  async #filled(session: Session, sandbox: Sandbox): Promise<Sandbox> {
    try {
      await sandbox.restore(await this.#workspaces?.open(session.id));
      return sandbox;
    } catch (error) {
      await this.#sleep(session);
      const why = error instanceof SandboxRefused ? error.message : errorName(error);
      throw new LaunchFailed(`the files could not be restored: ${why}`, { retriable: true, cause: error });
    }
  }

  /** Looks at what is there, and does what comes next. */
  async #settle(): Promise<void> {
    const session = this.#load();
    if (session === undefined) return await this.ctx.storage.deleteAll();
    if (session.phase === "asleep") return await this.#forget(session);
    if (!this.#container.running) return await this.#lost(session);
    await this.#adopt(session);
    const sandbox = new Sandbox(this.#container, session.key);
    const state = await sandbox.state();
    if (state === undefined) return await this.#bear(session);
    session.silentSince = undefined;
    if (state.runners === 0) return await this.#rest(session, state);
    session.idleSince = undefined;
    this.#store(session);
    await this.ctx.storage.setAlarm(Date.now() + TICK_MS);
    if (this.#listener !== undefined) return;
    const answer = await sandbox.follow().catch(unanswered);
    if (answer === undefined) return; // the next look listens again
    this.#listener = Symbol(session.id);
    this.ctx.waitUntil(this.#listen(session.id, linesOf(answer.body), this.#listener));
  }

  /** Without a runner: saves the files, keeps the container warm for a while, and ends it. */
  async #rest(session: Session, state: SandboxState): Promise<void> {
    session.idleSince ??= Date.now();
    if (session.unsaved) await this.#save(session);
    const warmMs = Math.max(session.options.keepWarmSeconds * 1000, session.held ? HELD_MS : 0);
    const warmUntil = session.idleSince + warmMs;
    if (!session.unsaved && (state.stopping || Date.now() >= warmUntil)) return await this.#sleep(session);
    this.#store(session);
    const pause = Math.min(TICK_MS * 2 ** Math.max(session.failedSaves - 1, 0), SLOWEST_SAVE_MS);
    await this.ctx.storage.setAlarm(session.unsaved || state.stopping ? Date.now() + pause : warmUntil);
  }

  async #save(session: Session): Promise<void> {
    const names = { session: session.id, attempt: session.failedSaves + 1 };
    if (this.#workspaces === undefined) {
      const reason = "there is no bucket (WORKSPACES in wrangler.jsonc): the files end with the container";
      log.warning("not_saved", { ...names, reason });
      Object.assign(session, { unsaved: false, lost: "this environment keeps no files between containers" });
      return;
    }
    const began = Date.now();
    try {
      const archive = await new Sandbox(this.#container, session.key).archive(session.options.maxFilesBytes);
      const size = await this.#workspaces.save(session.id, archive);
      log.info("saved", { session: session.id, ms: Date.now() - began, reason: `${size} bytes` });
      Object.assign(session, { unsaved: false, failedSaves: 0, lost: "" });
    } catch (error) {
      session.failedSaves += 1;
      const refused = error instanceof SandboxRefused ? error : undefined;
      log.warning("not_saved", { ...names, error, reason: refused?.message });
      const goesOn =
        refused === undefined
          ? Date.now() - (session.idleSince ?? 0) < OUTAGE_MS
          : session.failedSaves < (SAVES_REFUSED.get(refused.status) ?? MAX_SAVES);
      if (goesOn) return;
      const reason = "given up: the next container gets the files saved before";
      log.error("files_lost", { session: session.id, reason });
      const why = refused?.message ?? "the bucket did not take them";
      Object.assign(session, { unsaved: false, lost: `your files could not be saved: ${why}` });
    }
  }

  /** The container has ended without us. Its session's lease lapses, and healing answers for its runner. */
  async #lost(session: Session): Promise<void> {
    const since = session.unsaved ? " with files that were not saved" : "";
    log.warning("sandbox_lost", {
      session: session.id,
      reason: `the container ended${exitCode(this.#exit ?? "")}${since}`,
    });
    if (session.unsaved) session.lost = "your container ended before your files were saved";
    await this.#asleep(session);
  }

  /** A container that does not answer may only be busy. */
  async #bear(session: Session): Promise<void> {
    session.silentSince ??= Date.now();
    this.#store(session);
    if (Date.now() - session.silentSince < SILENT_MS) return await this.ctx.storage.setAlarm(Date.now() + TICK_MS);
    log.error("sandbox_silent", { session: session.id, ms: Date.now() - session.silentSince });
    if (session.unsaved) session.lost = "your container stopped answering before your files were saved";
    await this.#sleep(session);
  }

  async #sleep(session: Session): Promise<void> {
    await this.#container.destroy();
    await this.#asleep(session);
  }

  async #asleep(session: Session): Promise<void> {
    Object.assign(session, { phase: "asleep", key: "", unsaved: false, idleSince: Date.now() });
    this.#store(session);
    await this.ctx.storage.setAlarm(Date.now() + session.options.retentionSeconds * 1000);
    try {
      await this.env.DISPATCHER.getByName(DISPATCHER_NAME).ended(session.id);
    } catch (error) {
      log.warning("ended", { session: session.id, error, reason: "the dispatcher learns it from its next sweep" });
    }
  }

  /** Deletes the files of a session that nobody used for as long as they are kept. */
  async #forget(session: Session): Promise<void> {
    const due = (session.idleSince ?? 0) + session.options.retentionSeconds * 1000;
    if (Date.now() < due) return await this.ctx.storage.setAlarm(due);
    await this.#workspaces?.delete(session.id);
    await this.ctx.storage.deleteAll(); // the alarm too, from compatibility date 2026-02-24 on
    log.info("deleted", { session: session.id });
  }

  async #holdTo({ egress }: Session): Promise<void> {
    if (egress !== undefined) await hold(this.#container, this.ctx.exports.Egress({ props: egress }), egress);
  }

  /** Takes over a container that runs, after a loss of memory: the platform's part of it too. */
  async #adopt(session: Session): Promise<void> {
    if (this.#isWatched) return;
    await this.#holdTo(session);
    this.#watch();
  }

  /** Hears of the container's end, which also keeps this object in memory until then. */
  #watch(): void {
    this.#isWatched = true;
    const watching = this.#container.monitor().then(
      () => "0",
      (error: unknown) => (error instanceof Error ? error.message : String(error)),
    );
    this.ctx.waitUntil(
      watching.then((exit) => {
        this.#isWatched = false;
        this.#exit = exit;
        return this.#inTurn(() => this.#settle());
      }),
    );
  }

  /** Passes on what the runners say, up to the end of the last or of the connection. */
  async #listen(sessionId: string, lines: AsyncGenerator<string>, me: symbol): Promise<void> {
    const emit = runnerLog(sessionId);
    for await (const line of lines) {
      if (this.#listener !== me) return;
      sayIn(emit, line);
    }
    if (this.#listener !== me) return;
    this.#listener = undefined;
    await this.#inTurn(() => this.#settle());
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#turn.then(work);
    this.#turn = done.catch(() => undefined); // who asked for it hears of it
    return done;
  }

  #load(): Session | undefined {
    return this.ctx.storage.kv.get<Session>("session");
  }

  #store(session: Session): void {
    this.ctx.storage.kv.put("session", session);
  }
}

function unanswered(error: unknown): undefined {
  if (!(error instanceof SandboxRefused)) throw error;
  return undefined;
}

/** The files that a runner finds, with the news that some of its agent's own are gone. */
function told(files: LaunchFiles, news: string): LaunchFiles {
  if (news === "") return files;
  const line = `files: ${news}; what is here was saved before that, if anything is\n`;
  const others = new TextDecoder().decode(files.get(ERRORS));
  return new Map([...files, [ERRORS, new TextEncoder().encode(others + line)]]);
}
