/**
 * What a session's object must know after it has lost its memory: its launch, its lease, its begun calls, and what is in step
 * with the server. The tables lie in the same database as the files, so one transaction covers both.
 */

import type { Journal, Outcome } from "../_shared/guard.ts";
import type { Job } from "../_shared/jobs.ts";
import type { LeaseRecord } from "../_shared/lease.ts";
import type { RunnerStore } from "../_shared/runner.ts";
import type { Baselines } from "./memory.ts";
import type { InstalledSkills } from "./skills.ts";

/** What a session is started with. */
export interface Launch {
  readonly job: Job;
  readonly maxFilesBytes: number;
  readonly retentionSeconds: number;
  /** The dispatcher brought skills along that the session's token may not read. */
  readonly areSkillsBrought: boolean;
}

const SKILL = "skill";

export class State implements RunnerStore {
  readonly #storage: DurableObjectStorage;
  readonly #sql: SqlStorage;
  readonly journal: Journal;
  readonly skills: InstalledSkills;
  readonly baselines: Baselines;

  constructor(storage: DurableObjectStorage) {
    this.#storage = storage;
    this.#sql = storage.sql;
    const atomically = <T>(work: () => T): T => this.#storage.transactionSync(work);
    this.journal = {
      find: (callId) => this.#findCall(callId),
      begin: (callId) => this.#saveCall(callId, "begun"),
      finish: (callId, outcome) => this.#saveCall(callId, outcome),
      forget: (callId) => this.#sql.exec("DELETE FROM calls WHERE id = ?", callId),
      atomically,
    };
    this.skills = {
      versionOf: (directory) => this.#marks(SKILL).get(directory),
      note: (directory, version) => this.#mark(SKILL, directory, version),
      atomically,
    };
    this.baselines = {
      all: (root) => this.#marks(root),
      set: (root, path, sha) => this.#mark(root, path, sha),
      delete: (root, path) => this.#sql.exec("DELETE FROM marks WHERE kind = ? AND path = ?", root, path),
      atomically,
    };
  }

  /** Makes the tables where they are not there yet. Until then the object has stored nothing, and costs nothing. */
  create(): void {
    this.#sql.exec("CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID");
    this.#sql.exec("CREATE TABLE IF NOT EXISTS calls (id TEXT PRIMARY KEY, outcome TEXT NOT NULL) WITHOUT ROWID");
    this.#sql.exec(
      "CREATE TABLE IF NOT EXISTS marks (kind TEXT NOT NULL, path TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, path)) WITHOUT ROWID",
    );
  }

  /** False for an object that nobody ever started, or whose files were deleted. */
  exists(): boolean {
    return this.#sql.exec("SELECT 1 FROM sqlite_master WHERE name = 'state'").toArray().length > 0;
  }

  /** The launch of the runner there is, or was when the object lost its memory. */
  launch(): Launch | undefined {
    return this.#get<Launch>("launch");
  }

  /** A new runner: what an older one knew of its lease is not its own. */
  begin(launch: Launch): void {
    this.#storage.transactionSync(() => {
      for (const key of ["lease", "crashes", "keptUntil"]) this.#delete(key);
      this.#set("launch", launch);
    });
  }

  /**
   * No runner any more; the token goes with it. Begun calls stay: the next runner answers for them. The files are kept until
   * `keptUntil`, in milliseconds since the epoch.
   */
  end(keptUntil: number): void {
    this.#storage.transactionSync(() => {
      for (const key of ["launch", "lease", "crashes"]) this.#delete(key);
      this.#set("keptUntil", keptUntil);
    });
  }

  /** One more runner that ended with a mistake of ours. Returns how many have. */
  noteCrash(): number {
    const crashes = (this.#get<number>("crashes") ?? 0) + 1;
    this.#set("crashes", crashes);
    return crashes;
  }

  /** A runner got somewhere: its predecessors' mistakes do not count against the next one. */
  forgetCrashes(): void {
    this.#delete("crashes");
  }

  /** Until when the files of a session without a runner are kept; undefined while there is one. */
  keptUntil(): number | undefined {
    return this.#get<number>("keptUntil");
  }

  lease(): LeaseRecord | undefined {
    return this.#get<LeaseRecord>("lease");
  }

  saveLease(record: LeaseRecord): void {
    this.#set("lease", record);
  }

  #findCall(callId: string): Outcome | "begun" | undefined {
    const rows = this.#sql.exec<{ outcome: string }>("SELECT outcome FROM calls WHERE id = ?", callId).toArray();
    return rows[0] === undefined ? undefined : (JSON.parse(rows[0].outcome) as Outcome | "begun");
  }

  #saveCall(callId: string, outcome: Outcome | "begun"): void {
    this.#sql.exec("INSERT OR REPLACE INTO calls VALUES (?, ?)", callId, JSON.stringify(outcome));
  }

  #marks(kind: string): Map<string, string> {
    const rows = this.#sql.exec<{ path: string; value: string }>("SELECT path, value FROM marks WHERE kind = ?", kind);
    return new Map(rows.toArray().map(({ path, value }) => [path, value]));
  }

  #mark(kind: string, path: string, value: string): void {
    this.#sql.exec("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", kind, path, value);
  }

  #get<T>(key: string): T | undefined {
    const rows = this.#sql.exec<{ value: string }>("SELECT value FROM state WHERE key = ?", key).toArray();
    return rows[0] === undefined ? undefined : (JSON.parse(rows[0].value) as T);
  }

  #set(key: string, value: unknown): void {
    this.#sql.exec("INSERT OR REPLACE INTO state VALUES (?, ?)", key, JSON.stringify(value));
  }

  #delete(key: string): void {
    this.#sql.exec("DELETE FROM state WHERE key = ?", key);
  }
}
