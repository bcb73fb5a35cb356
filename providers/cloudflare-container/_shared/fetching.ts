/**
 * Fetches a file from the public internet, for a session whose metadata names it (R12).
 *
 * Whoever writes a session's metadata chooses the address: so only https, only names of the public internet, no more than a
 * few megabytes, and each redirect is checked like the first address. A Worker cannot resolve a name by itself and hold on to
 * what it found. It does not need to: it runs in the platform's network and not in yours, where such a name would lead.
 */

import { FetchRefused } from "./errors.ts";

const FETCH_MS = 30_000; // for one file, redirects and all
const REDIRECTS = 3;
const MOVED = new Set([301, 302, 303, 307, 308]);
const NOT_PUBLIC = /(^|\.)(localhost|local|internal|intranet|lan|home|corp|onion|home\.arpa)$/;

export type Fetch = (url: string, init: RequestInit) => Promise<Response>;

/** The file behind `url`. Throws `FetchRefused`; its text never quotes the address, which may hold a key. */
export async function fetchPublic(
  url: string,
  maxBytes: number,
  fetcher: Fetch = (address, init) => fetch(address, init),
  ms = FETCH_MS,
): Promise<Uint8Array> {
  const init = { redirect: "manual" as const, signal: AbortSignal.timeout(ms) };
  let address = checked(url);
  try {
    for (let redirects = 0; redirects <= REDIRECTS; redirects += 1) {
      const answer = await fetcher(address, init);
      const location = MOVED.has(answer.status) ? answer.headers.get("location") : null;
      if (location === null) return await read(answer, maxBytes);
      await answer.body?.cancel();
      address = checked(location, address);
    }
  } catch (error) {
    if (error instanceof FetchRefused) throw error;
    if (init.signal.aborted) throw new FetchRefused(`it did not arrive within ${ms / 1000} s`);
    throw new FetchRefused(`its server could not be read: ${error instanceof Error ? error.name : typeof error}`);
  }
  throw new FetchRefused(`its server redirects more than ${REDIRECTS} times`);
}

function checked(url: string, base?: string): string {
  const address = URL.parse(url, base);
  if (address === null) throw new FetchRefused("it has no usable address");
  if (address.protocol !== "https:") throw new FetchRefused("it is not https");
  if (address.username !== "" || address.password !== "") throw new FetchRefused("its address has a password in it");
  const host = address.hostname.replace(/\.$/, "");
  // However an address is written, a URL has it as numbers with dots, or in brackets.
  if (/^[\d.]+$/.test(host) || host.startsWith("[")) throw new FetchRefused("its host is a number and not a name");
  if (!host.includes(".") || NOT_PUBLIC.test(host))
    throw new FetchRefused("its host is no name of the public internet");
  return address.href;
}

async function read(answer: Response, maxBytes: number): Promise<Uint8Array> {
  if (answer.status !== 200) {
    await answer.body?.cancel();
    throw new FetchRefused(`its server answered ${answer.status}`);
  }
  const chunks: Uint8Array[] = [];
  let size = 0;
  const reader = answer.body?.getReader();
  for (;;) {
    const part = await reader?.read();
    if (part === undefined || part.done) break;
    size += part.value.byteLength;
    if (size > maxBytes) {
      await reader?.cancel();
      throw new FetchRefused(`it is larger than ${maxBytes} bytes`);
    }
    chunks.push(part.value);
  }
  const content = new Uint8Array(size);
  let at = 0;
  for (const chunk of chunks) {
    content.set(chunk, at);
    at += chunk.byteLength;
  }
  return content;
}
