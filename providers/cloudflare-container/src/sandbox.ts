/**
 * A session's container, and the requests that its first process answers (container/sandbox_init.py).
 *
 * The platform's errors are plain ones with a text; what they mean is decided here, once. That a container is running says
 * nothing: it is there when its first process answers.
 */

import type { LaunchFiles } from "../_shared/dispatcher.ts";
import { LaunchFailed } from "../_shared/errors.ts";

const PORT = 8080;
const BOOT_MS = 60_000; // the platform may have to fetch the image first
const BOOT_PAUSE_MS = 150;
const ANSWER_MS = 10_000;
const NO_ANSWER = 503;
const LONGEST_REASON = 300;
export const TRANSFER_MS = 330_000; // above what the first process allows its archiver

/** What its first process says of itself. */
export interface SandboxState {
  /** It has not got the session's files yet. */
  readonly fresh: boolean;
  /** It was told to end: it starts no more runners, and waits a while for its files to be saved. */
  readonly stopping: boolean;
  readonly runners: number;
}

/** The first process refused, and said why; or there was no answer (`NO_ANSWER`). */
export class SandboxRefused extends Error {
  override name = "SandboxRefused";
  readonly status: number;

  constructor(status: number, reason: string, options?: ErrorOptions) {
    super(reason, options);
    this.status = status;
  }
}

/** What the platform says when it has no container to give, and what to do about it. */
const PLATFORM: readonly [RegExp, string][] = [
  [/no container instance/i, "there is no container to be had: raise max_instances, or wait for the first roll-out"],
  [/too many containers/i, "the platform asks to start containers more slowly"],
];

/** An answer of the first process. */
export type Answer = Response & { readonly body: ReadableStream<Uint8Array> };

export class Sandbox {
  readonly #container: Container;
  readonly #key: string;

  constructor(container: Container, key: string) {
    this.#container = container;
    this.#key = key;
  }

  /** Returns once the first process of a container that was just started answers. Throws `LaunchFailed`. */
  async answers(exit: () => string | undefined): Promise<void> {
    const until = Date.now() + BOOT_MS;
    while ((await this.state()) === undefined) {
      if (!this.#container.running) throw notStarted(exit() ?? "");
      if (Date.now() > until) throw new LaunchFailed("the container did not answer in time", { retriable: true });
      await new Promise((resolve) => setTimeout(resolve, BOOT_PAUSE_MS));
    }
  }

  /** Undefined when it does not answer. */
  async state(): Promise<SandboxState | undefined> {
    try {
      return await (await this.#ask("GET", "/")).json<SandboxState>();
    } catch (error) {
      if (error instanceof SandboxRefused && error.status !== NO_ANSWER) throw error; // another container's key: a bug
      return undefined;
    }
  }

  /** Puts files into the working directory and starts a runner, told its job on stdin (R11). Its output, to its end. */
  start(stdin: string, files: LaunchFiles): Promise<Answer> {
    const job = new TextEncoder().encode(stdin);
    const sizes = { files: [...files].map(([path, content]) => [path, content.byteLength]), stdin: job.byteLength };
    return this.#ask("POST", "/runners", { body: new Blob([JSON.stringify(sizes), "\n", ...files.values(), job]) });
  }

  /** The output of the runners there are, from now on. */
  follow(): Promise<Answer> {
    return this.#ask("GET", "/runners");
  }

  /** The files as an archive of at most so many bytes, with its size and checksum in the headers. Throws `SandboxRefused`. */
  archive(most: number): Promise<Answer> {
    return this.#ask("GET", `/workspace?most=${most}`, { signal: AbortSignal.timeout(TRANSFER_MS) });
  }

  /** Gives a fresh container its files, or says that there are none. Throws `SandboxRefused`. */
  async restore(archive: { body: ReadableStream; size: number; sha256: string } | undefined): Promise<void> {
    if (archive === undefined) {
      await this.#ask("PUT", "/workspace", { body: "", headers: { "content-length": "0" } });
      return;
    }
    const sized = archive.body.pipeThrough(new FixedLengthStream(archive.size));
    const headers = { "x-sha256": archive.sha256 };
    await this.#ask("PUT", "/workspace", { body: sized, headers, signal: AbortSignal.timeout(TRANSFER_MS) });
  }

  async #ask(method: string, path: string, init: RequestInit = {}): Promise<Answer> {
    const headers = { ...init.headers, authorization: `Bearer ${this.#key}` };
    const late = new AbortController(); // where nothing else is said: of the answer's beginning, not of its body
    const timer = setTimeout(() => late.abort(), ANSWER_MS);
    let response: Response;
    try {
      const port = this.#container.getTcpPort(PORT);
      response = await port.fetch(`http://sandbox${path}`, { signal: late.signal, ...init, method, headers });
    } catch (error) {
      throw new SandboxRefused(NO_ANSWER, "the container did not answer", { cause: error });
    } finally {
      clearTimeout(timer);
    }
    if (!response.ok) throw new SandboxRefused(response.status, (await response.text()).slice(0, LONGEST_REASON));
    if (response.body === null) throw new SandboxRefused(NO_ANSWER, "the container's answer has no body");
    return response as Answer;
  }
}

/** What `work` comes to, unless it takes longer: then `late`. It is not ended, nobody waits for it any more. */
export async function within<T>(ms: number, work: Promise<T>, late: Error): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | null = null;
  const waiting = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(late), ms);
  });
  try {
    return await Promise.race([work, waiting]);
  } finally {
    clearTimeout(timer);
  }
}

/** Why a container that was started is not there, by what the platform says. */
function notStarted(text: string): LaunchFailed {
  const known = PLATFORM.find(([pattern]) => pattern.test(text));
  const reason = known?.[1] ?? `the container ended while it started${exitCode(text)}`;
  return new LaunchFailed(reason, { retriable: true });
}

/** The exit code in one of the platform's texts, as the end of a sentence. */
export function exitCode(text: string): string {
  const code = /(\d+)\D*$/.exec(text)?.[1];
  return code === undefined ? "" : ` with ${code}`;
}
