/** Skill archives: zip, tar and tar.gz. Regular files only, without the one directory that wraps them all. */

import { unzipSync } from "fflate";
import { parseTar } from "nanotar";

export const MAX_ARCHIVE_BYTES = 16 * 1024 * 1024;
const MAX_UNPACKED_BYTES = 32 * 1024 * 1024;
const MAX_ENTRIES = 2_000;

/** The archive is unusable, too large, or has a path that leads out of it. */
export class BadArchive extends Error {
  override name = "BadArchive";
}

/** The files of an archive, by path relative to its wrapper. Throws `BadArchive`. */
export async function unpack(bytes: Uint8Array): Promise<Map<string, Uint8Array>> {
  const entries = await entriesOf(bytes);
  for (const name of entries.keys()) {
    if (name.startsWith("/") || name.split(/[\\/]/).includes("..")) throw new BadArchive("an entry leads out of it");
  }
  const parts = [...entries].map(([name, data]) => {
    const path = name.split("/").filter((part) => part !== "" && part !== ".");
    return { path, data };
  });
  const top = parts[0]?.path[0];
  const isWrapped = parts.every(({ path }) => path.length > 1 && path[0] === top);
  return new Map(parts.map(({ path, data }) => [path.slice(isWrapped ? 1 : 0).join("/"), data]));
}

async function entriesOf(bytes: Uint8Array): Promise<Map<string, Uint8Array>> {
  try {
    if (bytes[0] === 0x50 && bytes[1] === 0x4b) return unzip(bytes);
    return untar(bytes[0] === 0x1f && bytes[1] === 0x8b ? await gunzip(bytes) : bytes);
  } catch (error) {
    if (error instanceof BadArchive) throw error;
    throw new BadArchive(`it is no readable zip, tar or tar.gz: ${String(error)}`); // the two libraries throw plain errors
  }
}

function unzip(bytes: Uint8Array): Map<string, Uint8Array> {
  let size = 0;
  let count = 0;
  const files = unzipSync(bytes, {
    filter: ({ name, originalSize }) => {
      if (name.endsWith("/")) return false;
      size += originalSize; // what is unpacked is cut off there
      count += 1;
      check(size, count);
      return true;
    },
  });
  return new Map(Object.entries(files));
}

function untar(bytes: Uint8Array): Map<string, Uint8Array> {
  const files = parseTar(bytes, { filter: (file) => file.type === "file" || file.type === "contiguousFile" });
  check(bytes.byteLength, files.length);
  return new Map(files.map((file) => [file.name, file.data ?? new Uint8Array()]));
}

async function gunzip(bytes: Uint8Array): Promise<Uint8Array> {
  const reader = new Blob([bytes as Uint8Array<ArrayBuffer>])
    .stream()
    .pipeThrough(new DecompressionStream("gzip"))
    .getReader();
  const chunks: Uint8Array[] = [];
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    size += value.byteLength;
    check(size, 0);
    chunks.push(value);
  }
  return new Uint8Array(await new Blob(chunks as Uint8Array<ArrayBuffer>[]).arrayBuffer());
}

function check(size: number, count: number): void {
  if (size > MAX_UNPACKED_BYTES) throw new BadArchive(`it unpacks to more than ${MAX_UNPACKED_BYTES} bytes`);
  if (count > MAX_ENTRIES) throw new BadArchive(`it has more than ${MAX_ENTRIES} files`);
}
