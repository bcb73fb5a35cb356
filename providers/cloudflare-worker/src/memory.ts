/**
 * Memory stores, mounted in the session's files and kept in step with the server, by the rules of the SDK's worker.
 *
 * A file changed only here is sent, on the condition that the memory is still what we had; one changed only there is fetched;
 * one changed on both sides becomes the server's. No tool deletes a file, so nothing is ever deleted there. What was last in
 * step (the baseline) lies beside the files, so a change that a lost runner did not send is sent by the next one.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaManagedAgentsMemory } from "@anthropic-ai/sdk/resources/beta/memory-stores/memories";
import type { BetaManagedAgentsSession } from "@anthropic-ai/sdk/resources/beta/sessions/sessions";
import { apiError, errorLabel, isStatus } from "../_shared/api.ts";
import { SetupFailed } from "../_shared/errors.ts";
import { log } from "../_shared/log.ts";
import { FileError, type Files, resolvePath, type Stat, WORKDIR } from "./files.ts";
import type { Mount } from "./tools.ts";

const SYNC_MS = 15_000; // the SDK's
const PAGE_FULL = 20;
const PAGE = 100;

/** Where baselines are kept: what a file's hash was when it was last in step. */
export interface Baselines {
  all(root: string): Map<string, string>;
  set(root: string, path: string, sha: string): void;
  delete(root: string, path: string): void;
  atomically<T>(work: () => T): T;
}

interface Store extends Mount {
  readonly id: string;
}

interface Local extends Stat {
  readonly sha: string;
}

export class Memory {
  readonly #files: Files;
  readonly #baselines: Baselines;
  readonly #sessionId: string;
  #api: Anthropic | undefined;
  #stores: Store[] = [];
  readonly #refused = new Map<string, string>(); // path -> hash of what the server will not take
  #syncedAt = 0;

  constructor(files: Files, baselines: Baselines, sessionId: string) {
    this.#files = files;
    this.#baselines = baselines;
    this.#sessionId = sessionId;
  }

  get mounts(): readonly Mount[] {
    return this.#stores;
  }

  /** Brings every attached store up to date. Throws: a session must not run without the memory its prompt names. */
  async mount(session: BetaManagedAgentsSession, api: Anthropic): Promise<void> {
    this.#api = api;
    this.#stores = session.resources.flatMap((resource) => {
      if (resource.type !== "memory_store") return [];
      const root = resource.mount_path || `${WORKDIR}/memory/${resource.name || resource.memory_store_id}`;
      const isReadOnly = resource.access === "read_only";
      if (resolvePath(root) !== root || root === "/")
        throw new SetupFailed("a memory store's mount path is not a clean one");
      return [{ id: resource.memory_store_id, root, isReadOnly }];
    });
    for (const store of this.#stores) {
      try {
        this.#files.makeDirectory(store.root);
      } catch (error) {
        if (error instanceof FileError) throw new SetupFailed(`a memory store cannot be mounted: ${error.message}`);
        throw error;
      }
      await this.#step(store, api);
    }
    this.#syncedAt = Date.now();
  }

  /** Every store in step again, when it is time or at the end. Never throws: the next one tries again. */
  async sync(isFinal: boolean): Promise<void> {
    if (this.#api === undefined || (!isFinal && Date.now() - this.#syncedAt < SYNC_MS)) return;
    this.#syncedAt = Date.now();
    for (const store of this.#stores) {
      try {
        await this.#step(store, this.#api);
      } catch (error) {
        log.warning("memory", { session: this.#sessionId, error: errorLabel(apiError(error)), reason: "not in step" });
      }
    }
  }

  async #step(store: Store, api: Anthropic): Promise<void> {
    const baseline = this.#baselines.all(store.root);
    const isNew = baseline.size === 0; // then the list brings the contents along
    const remote = new Map<string, BetaManagedAgentsMemory>();
    const query = isNew ? { view: "full" as const, limit: PAGE_FULL } : { view: "basic" as const, limit: PAGE };
    for await (const memory of api.beta.memoryStores.memories.list(store.id, query)) {
      if (memory.type === "memory") remote.set(`${store.root}/${memory.path.replace(/^\/+/, "")}`, memory);
    }
    const local = new Map<string, Local>();
    for (const file of this.#files.files(store.root)) {
      local.set(file.path, { ...file, sha: await sha256(this.#files.read(file.path)) });
    }
    for (const path of new Set([...remote.keys(), ...local.keys(), ...baseline.keys()])) {
      await this.#stepFile(store, api, path, remote.get(path), local.get(path), baseline.get(path));
    }
  }

  async #stepFile(
    store: Store,
    api: Anthropic,
    path: string,
    remote: BetaManagedAgentsMemory | undefined,
    local: Local | undefined,
    base: string | undefined,
  ): Promise<void> {
    const isChangedHere = local !== undefined && local.sha !== base;
    if (remote !== undefined && remote.content_sha256 === local?.sha) {
      return this.#baselines.set(store.root, path, local.sha);
    }
    if (remote !== undefined && (remote.content_sha256 !== base || local === undefined)) {
      if (isChangedHere && base !== undefined) this.#warn("changed here and on the server: the server's is kept");
      return this.#fetch(store, api, path, remote, local);
    }
    if (remote === undefined && !isChangedHere) {
      this.#baselines.atomically(() => {
        if (!this.#isAsSeen(path, local)) return;
        this.#files.remove(path); // deleted on the server
        this.#baselines.delete(store.root, path);
      });
      return;
    }
    if (isChangedHere && !store.isReadOnly && this.#refused.get(path) !== local.sha) {
      await this.#send(store, api, path, local.sha, remote);
    }
  }

  async #fetch(
    store: Store,
    api: Anthropic,
    path: string,
    listed: BetaManagedAgentsMemory,
    local: Local | undefined,
  ): Promise<void> {
    const { memories } = api.beta.memoryStores;
    if (resolvePath(path) !== path) return this.#warn("a memory's path is not a clean one: it is left out");
    try {
      const full =
        listed.content == null
          ? await memories.retrieve(listed.id, { memory_store_id: store.id, view: "full" })
          : listed;
      this.#baselines.atomically(() => {
        if (!this.#isAsSeen(path, local)) return;
        this.#files.write(path, new TextEncoder().encode(full.content ?? ""));
        this.#baselines.set(store.root, path, full.content_sha256);
      });
    } catch (error) {
      if (error instanceof FileError) return this.#warn(`a memory cannot be written: ${error.message}`);
      if (!isStatus(error, 404)) throw error; // 404: deleted since it was listed
    }
  }

  async #send(
    store: Store,
    api: Anthropic,
    path: string,
    sha: string,
    existing: BetaManagedAgentsMemory | undefined,
  ): Promise<void> {
    const { memories } = api.beta.memoryStores;
    try {
      const content = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.#files.read(path));
      const precondition = { type: "content_sha256" as const, content_sha256: existing?.content_sha256 ?? "" };
      const saved =
        existing === undefined
          ? await memories.create(store.id, { path: path.slice(store.root.length), content })
          : await memories.update(existing.id, { memory_store_id: store.id, content, precondition });
      this.#baselines.set(store.root, path, saved.content_sha256);
    } catch (error) {
      if (isStatus(error, 409, 404))
        return this.#warn("a memory changed on the server meanwhile: the next sync decides");
      if (!(error instanceof TypeError) && !isStatus(error, 400, 413)) throw error;
      this.#refused.set(path, sha); // no text, too large or otherwise refused: not again before it changes
      this.#warn("the server does not take a memory file; it stays here only");
    }
  }

  /** The agent goes on while we talk to the server: what it has written since we looked is the next sync's. */
  #isAsSeen(path: string, local: Local | undefined): boolean {
    const now = this.#files.stat(path);
    return now?.mtime === local?.mtime && now?.size === local?.size;
  }

  #warn(reason: string): void {
    log.warning("memory", { session: this.#sessionId, reason });
  }
}

async function sha256(bytes: Uint8Array): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes as Uint8Array<ArrayBuffer>));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
