/**
 * The sessions' files in R2, one object a session. R2 makes an object visible once all of it has arrived and its checksum
 * is right, so there is the whole save or the one before: never half of one.
 */

import { type Answer, SandboxRefused, TRANSFER_MS, within } from "./sandbox.ts";

const ANSWER_MS = 20_000;

/** The bucket did not answer in time: nobody waits for ever for a service that is out. */
export class BucketStalled extends Error {
  override name = "BucketStalled";
}

export class Workspaces {
  readonly #bucket: R2Bucket;
  readonly #answerMs: number;
  readonly #transferMs: number;

  constructor(bucket: R2Bucket, answerMs = ANSWER_MS, transferMs = TRANSFER_MS + ANSWER_MS) {
    this.#bucket = bucket;
    this.#answerMs = answerMs;
    this.#transferMs = transferMs;
  }

  /** Keeps the archive a sandbox answers with. Returns its size in bytes. */
  async save(sessionId: string, archive: Answer): Promise<number> {
    const sha256 = archive.headers.get("x-sha256") ?? "";
    if (!/^[0-9a-f]{64}$/.test(sha256)) throw new SandboxRefused(502, "no archive was sent");
    // What comes from the container breaks off sooner: so a put that nobody waits for any more never replaces a later one.
    const saved = await bounded(this.#bucket.put(name(sessionId), archive.body, { sha256 }), this.#transferMs);
    return saved.size;
  }

  /** The archive saved last; undefined when there is none. */
  async open(sessionId: string): Promise<{ body: ReadableStream; size: number; sha256: string } | undefined> {
    const found = await bounded(this.#bucket.get(name(sessionId)), this.#answerMs);
    if (found === null) return undefined;
    return { body: found.body, size: found.size, sha256: hex(found.checksums.sha256) };
  }

  async delete(sessionId: string): Promise<void> {
    await bounded(this.#bucket.delete(name(sessionId)), this.#answerMs);
  }
}

function bounded<T>(work: Promise<T>, ms: number): Promise<T> {
  return within(ms, work, new BucketStalled(`the bucket did not answer within ${ms / 1000} s`));
}

function name(sessionId: string): string {
  return `workspaces/${sessionId}.tar.gz`;
}

function hex(digest: ArrayBuffer | undefined): string {
  return [...new Uint8Array(digest ?? new ArrayBuffer())].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
