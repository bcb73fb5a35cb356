/**
 * The sessions' files in R2, one object a session. R2 makes an object visible once all of it has arrived and its checksum
 * is right, so there is the whole save or the one before: never half of one.
 */

import { type Answer, SandboxRefused } from "./sandbox.ts";

export class Workspaces {
  readonly #bucket: R2Bucket;

  constructor(bucket: R2Bucket) {
    this.#bucket = bucket;
  }

  /** Keeps the archive a sandbox answers with. Returns its size in bytes. */
  async save(sessionId: string, archive: Answer): Promise<number> {
    const sha256 = archive.headers.get("x-sha256") ?? "";
    if (!/^[0-9a-f]{64}$/.test(sha256)) throw new SandboxRefused(502, "no archive was sent");
    const saved = await this.#bucket.put(name(sessionId), archive.body, { sha256 });
    return saved.size;
  }

  /** The archive saved last; undefined when there is none. */
  async open(sessionId: string): Promise<{ body: ReadableStream; size: number; sha256: string } | undefined> {
    const found = await this.#bucket.get(name(sessionId));
    if (found === null) return undefined;
    return { body: found.body, size: found.size, sha256: hex(found.checksums.sha256) };
  }

  async delete(sessionId: string): Promise<void> {
    await this.#bucket.delete(name(sessionId));
  }
}

function name(sessionId: string): string {
  return `workspaces/${sessionId}.tar.gz`;
}

function hex(digest: ArrayBuffer | undefined): string {
  return [...new Uint8Array(digest ?? new ArrayBuffer())].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
