/** What hosts whose sandboxes belong to Durable Objects share: the table of live sessions, and what an object's errors mean. */

import type { LiveSessions } from "./dispatcher.ts";
import { LaunchFailed } from "./errors.ts";

/** What the platform throws when an object does not answer, by the flags it documents. What our object throws propagates. */
export async function asLaunchFailed<T>(call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    const { overloaded, remote, retryable } = error as { overloaded?: boolean; remote?: boolean; retryable?: boolean };
    if (overloaded) throw new LaunchFailed("the session's object is overloaded", { retriable: false, cause: error });
    if (retryable) throw new LaunchFailed("the session's object was not reached", { retriable: true, cause: error });
    if (!remote) throw new LaunchFailed("the session's object did not answer", { retriable: true, cause: error });
    throw error;
  }
}

/** The sessions with a sandbox that runs, in the dispatcher's own storage. */
export class LiveTable implements LiveSessions {
  readonly #sql: SqlStorage;

  constructor(sql: SqlStorage) {
    this.#sql = sql;
    sql.exec("CREATE TABLE IF NOT EXISTS live (session TEXT PRIMARY KEY) WITHOUT ROWID");
  }

  count(): number {
    return this.#sql.exec<{ count: number }>("SELECT count(*) AS count FROM live").one().count;
  }

  has(sessionId: string): boolean {
    return this.#sql.exec("SELECT 1 FROM live WHERE session = ?", sessionId).toArray().length > 0;
  }

  add(sessionId: string): void {
    this.#sql.exec("INSERT OR REPLACE INTO live VALUES (?)", sessionId);
  }

  remove(sessionId: string): void {
    this.#sql.exec("DELETE FROM live WHERE session = ?", sessionId);
  }

  retain(sessionIds: ReadonlySet<string>): void {
    const rows = this.#sql.exec<{ session: string }>("SELECT session FROM live").toArray();
    for (const { session } of rows) if (!sessionIds.has(session)) this.remove(session);
  }
}
