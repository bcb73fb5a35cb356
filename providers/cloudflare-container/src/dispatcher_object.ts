/**
 * The one dispatcher of a deployment. It holds the environment key and drains the queue for all of the Worker's instances:
 * signals from anywhere meet in one object, so there is one drain at a time without a lock (R8).
 */

import { DurableObject } from "cloudflare:workers";
import { Dispatcher, type LaunchFiles, type Provider } from "../_shared/dispatcher.ts";
import { LaunchFailed } from "../_shared/errors.ts";
import type { Job } from "../_shared/jobs.ts";
import { asLaunchFailed, LiveTable } from "../_shared/objects.ts";
import { stage } from "../_shared/staging.ts";
import { rulesFor } from "./egress.ts";
import { toStdin } from "./runner_log.ts";
import type { SessionObject } from "./session_object.ts";
import { type FolderSettings, readAll } from "./settings.ts";

export class DispatcherObject extends DurableObject<Env> {
  readonly #live: LiveTable;
  #dispatcher: Dispatcher | undefined;
  #sweeping: Promise<void> | undefined;

  constructor(ctx: DurableObjectState, env: Env) {
    super(ctx, env);
    this.#live = new LiveTable(ctx.storage.sql);
  }

  /** There may be work. Returns at once; the drain goes on in the object. Throws `SettingsError`. */
  wake(): void {
    this.#core().wake();
  }

  /** A webhook has named the session: the next sweeps look at it first. Throws `SettingsError`. */
  suspect(sessionId: string): void {
    this.#core().suspect({ sessionId });
  }

  /** Drains, heals and cleans up. Throws `SettingsError`. */
  async sweep(): Promise<void> {
    this.#sweeping ??= this.#core()
      .sweep()
      .finally(() => {
        this.#sweeping = undefined;
      });
    await this.#sweeping;
  }

  /** A session's container has ended. */
  ended(sessionId: string): void {
    this.#live.remove(sessionId);
    this.#dispatcher?.roomMade(); // one that lost its memory waits for nothing: the next sweep drains
  }

  #core(): Dispatcher {
    if (this.#dispatcher === undefined) {
      const settings = readAll(this.env);
      const provider = new ContainerProvider(this.env.SESSIONS, settings);
      const ownTools = new Set(settings.toolNames);
      const workerId = this.ctx.id.toString();
      this.#dispatcher = new Dispatcher({ settings, provider, live: this.#live, workerId, ownTools, stage });
    }
    return this.#dispatcher;
  }
}

/** The compute side: a Durable Object and its container for each session, found by the session's id. */
export class ContainerProvider implements Provider {
  readonly name = "cloudflare-container";
  readonly #sessions: DurableObjectNamespace<SessionObject>;
  readonly #settings: FolderSettings;

  constructor(sessions: DurableObjectNamespace<SessionObject>, settings: FolderSettings) {
    this.#sessions = sessions;
    this.#settings = settings;
  }

  async launch(job: Job, files: LaunchFiles): Promise<{ sandbox: string; outcome: "ready" | "served_already" }> {
    const { keepWarmSeconds, maxFilesBytes, retentionSeconds, allowedHosts } = this.#settings;
    const egress = rulesFor(job.sessionId, allowedHosts, job.baseUrl);
    const options = { keepWarmSeconds, maxFilesBytes, retentionSeconds, egress };
    const stdin = toStdin(job, this.#settings);
    const { outcome, reason, retriable } = await asLaunchFailed(() =>
      this.#sessions.getByName(job.sessionId).start(job.sessionId, stdin, files, options),
    );
    if (outcome === "failed") throw new LaunchFailed(reason, { retriable });
    return { sandbox: job.sessionId, outcome };
  }
}
