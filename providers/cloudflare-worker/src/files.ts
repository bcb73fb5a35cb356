/**
 * The session's file system, in the SQLite storage of its Durable Object: it survives eviction and the next message.
 *
 * Files are bytes, cut into chunks below SQLite's limit for a row. There are directories and regular files, no links and no
 * devices, so a path means what it says. Every change is the caller's transaction.
 */

/** The workdir, as the agent knows it. */
export const WORKDIR = "/workspace";
/** A whole file is held in memory, which one isolate shares among its objects. */
export const MAX_FILE_BYTES = 8 * 1024 * 1024;
const MAX_NODES = 50_000;
const CHUNK_BYTES = 1024 * 1024; // a row holds at most 2 MB
const MAX_PATH_BYTES = 4096;
const MAX_NAME_BYTES = 255;

export type FileErrorCode = "ENOENT" | "ENOTDIR" | "EISDIR" | "ENAMETOOLONG" | "ENOSPC" | "EFBIG";

/** What a file system refuses. Its text is the SDK's toolset's for that code. */
export class FileError extends Error {
  override name = "FileError";
  readonly code: FileErrorCode;

  constructor(code: FileErrorCode) {
    super(TEXTS[code]);
    this.code = code;
  }
}

const TEXTS: Record<FileErrorCode, string> = {
  ENOENT: "no such file or directory",
  ENOTDIR: "not a directory",
  EISDIR: "is a directory",
  ENAMETOOLONG: "file name too long",
  ENOSPC: "no space left on device",
  EFBIG: `larger than ${MAX_FILE_BYTES} bytes`,
};

export interface Stat {
  readonly isFile: boolean;
  readonly size: number;
  /** Milliseconds since the epoch. */
  readonly mtime: number;
}

export interface Entry extends Stat {
  readonly path: string;
}

type Row = { path: string; is_file: number; size: number; mtime: number };

export class Files {
  readonly #sql: SqlStorage;
  readonly #maxBytes: number;

  /** `maxBytes` is for the whole database. Nothing is written before `create`. */
  constructor(sql: SqlStorage, maxBytes: number) {
    this.#sql = sql;
    this.#maxBytes = maxBytes;
  }

  /** Makes the tables and the workdir where they are not there yet. */
  create(): void {
    this.#sql.exec(
      "CREATE TABLE IF NOT EXISTS nodes (path TEXT PRIMARY KEY, is_file INTEGER NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL) WITHOUT ROWID",
    );
    this.#sql.exec(
      "CREATE TABLE IF NOT EXISTS chunks (path TEXT NOT NULL, seq INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (path, seq)) WITHOUT ROWID",
    );
    this.makeDirectory(WORKDIR);
  }

  stat(path: string): Stat | undefined {
    if (path === "/") return { isFile: false, size: 0, mtime: 0 };
    const row = this.#sql.exec<Row>("SELECT path, is_file, size, mtime FROM nodes WHERE path = ?", path).toArray()[0];
    return row === undefined ? undefined : entryOf(row);
  }

  /** The files at and under `path`, by path. */
  *files(path: string): Generator<Entry> {
    const [from, to] = inside(path);
    const rows = this.#sql.exec<Row>(
      "SELECT path, is_file, size, mtime FROM nodes WHERE is_file = 1 AND (path = ? OR (path >= ? AND path < ?)) ORDER BY path",
      path,
      from,
      to,
    );
    for (const row of rows.toArray()) yield entryOf(row);
  }

  /** The bytes of a file, chunk by chunk. Throws `FileError`. */
  *chunks(path: string): Generator<Uint8Array> {
    const { size } = this.#file(path);
    for (let seq = 0; seq * CHUNK_BYTES < size; seq += 1) {
      const row = this.#sql
        .exec<{ data: ArrayBuffer }>("SELECT data FROM chunks WHERE path = ? AND seq = ?", path, seq)
        .one();
      yield new Uint8Array(row.data);
    }
  }

  /** A whole file. Throws `FileError`. */
  read(path: string): Uint8Array {
    const bytes = new Uint8Array(this.#file(path).size);
    let at = 0;
    for (const chunk of this.chunks(path)) {
      bytes.set(chunk, at);
      at += chunk.byteLength;
    }
    return bytes;
  }

  /** Makes or replaces a file, and the directories above it. Throws `FileError`. */
  write(path: string, bytes: Uint8Array): void {
    const before = this.#checkRoom(path, bytes.byteLength);
    if (before !== undefined && !before.isFile) throw new FileError("EISDIR");
    this.makeDirectory(parentOf(path));
    this.#sql.exec("DELETE FROM chunks WHERE path = ?", path);
    for (let at = 0, seq = 0; at < bytes.byteLength; at += CHUNK_BYTES, seq += 1) {
      this.#sql.exec("INSERT INTO chunks VALUES (?, ?, ?)", path, seq, bytes.slice(at, at + CHUNK_BYTES).buffer);
    }
    this.#sql.exec("INSERT OR REPLACE INTO nodes VALUES (?, 1, ?, ?)", path, bytes.byteLength, Date.now());
  }

  /** Makes a directory and those above it, where they are not there yet. Throws `FileError`. */
  makeDirectory(path: string): void {
    const missing: string[] = [];
    for (let at = path; at !== "/"; at = parentOf(at)) {
      const stat = this.stat(at);
      if (stat?.isFile) throw new FileError("ENOTDIR");
      if (stat !== undefined) break;
      missing.push(at);
    }
    for (const at of missing) this.#sql.exec("INSERT INTO nodes VALUES (?, 0, 0, ?)", at, Date.now());
  }

  /** Removes a file, or a directory with all that is in it. Nothing there is fine. */
  remove(path: string): void {
    const [from, to] = inside(path);
    for (const table of ["chunks", "nodes"]) {
      this.#sql.exec(`DELETE FROM ${table} WHERE path = ? OR (path >= ? AND path < ?)`, path, from, to);
    }
  }

  #file(path: string): Stat {
    const stat = this.stat(path);
    if (stat === undefined) throw new FileError(this.#isBelowFile(path) ? "ENOTDIR" : "ENOENT");
    if (!stat.isFile) throw new FileError("EISDIR");
    return stat;
  }

  #isBelowFile(path: string): boolean {
    for (let at = parentOf(path); at !== "/"; at = parentOf(at)) if (this.stat(at)?.isFile) return true;
    return false;
  }

  #checkRoom(path: string, size: number): Stat | undefined {
    const isLong = path.length > MAX_PATH_BYTES || byteLength(path) > MAX_PATH_BYTES;
    if (isLong || path.split("/").some((name) => byteLength(name) > MAX_NAME_BYTES))
      throw new FileError("ENAMETOOLONG");
    if (size > MAX_FILE_BYTES) throw new FileError("EFBIG");
    const before = this.stat(path);
    const grows = size - (before?.size ?? 0);
    if (grows > 0 && this.#sql.databaseSize + grows > this.#maxBytes) throw new FileError("ENOSPC");
    if (before === undefined) {
      const { count } = this.#sql.exec<{ count: number }>("SELECT count(*) AS count FROM nodes").one();
      if (count >= MAX_NODES) throw new FileError("ENOSPC");
    }
    return before;
  }
}

/** `path` made absolute from the workdir, with `.`, `..` and doubled slashes taken out. */
export function resolvePath(path: string): string {
  const parts: string[] = [];
  for (const part of (path.startsWith("/") ? path : `${WORKDIR}/${path}`).split("/")) {
    if (part === "..") parts.pop();
    else if (part !== "" && part !== ".") parts.push(part);
  }
  return `/${parts.join("/")}`;
}

export function isWithin(root: string, path: string): boolean {
  return path === root || path.startsWith(root.endsWith("/") ? root : `${root}/`);
}

function parentOf(path: string): string {
  return path.slice(0, path.lastIndexOf("/")) || "/";
}

/** The half-open range of the paths below `path`: "0" comes right after "/". */
function inside(path: string): [string, string] {
  const root = path === "/" ? "" : path;
  return [`${root}/`, `${root}0`];
}

function entryOf(row: Row): Entry {
  return { path: row.path, isFile: row.is_file === 1, size: row.size, mtime: row.mtime };
}

export function byteLength(text: string): number {
  return new TextEncoder().encode(text).byteLength;
}
