/** The SDK's clients as we use them, and what its errors tell. */

import Anthropic, { APIConnectionError, APIError, type Middleware } from "@anthropic-ai/sdk";

/** For one call whose outcome we decide ourselves. */
export const CALL_TIMEOUT_MS = 10_000;
/** Of one request; the SDK's own default. */
export const MAX_RETRIES = 2;

const LARGEST_ANSWER = 32 * 1024 * 1024; // one that is larger is left to who asked, to be refused by its length

export interface ClientOptions {
  readonly maxRetries: number;
  /** Milliseconds for an answer to begin, and as many for it to end. */
  readonly timeout: number;
  readonly middleware?: Middleware[];
}

/** A proxy's page in the place of an answer: the SDK would hand it on as its text, of a session or of a beat. */
const refusePages: Middleware = async (request, next) => {
  const response = await next(request);
  if (!response.ok || !/^text\/(html|plain)/i.test(response.headers.get("content-type") ?? "")) return response;
  await response.body?.cancel();
  throw new APIConnectionError({ message: "a page in the place of an answer" });
};

/**
 * Reads an answer to its end, within the time that a request has: the SDK's timer ends with the headers, and what breaks off
 * or stalls after them it does not try again. A stream of events has no end; hearing.ts watches over those.
 */
function wholeAnswers(ms: number): Middleware {
  return async (request, next) => {
    const response = await next(request);
    const { body, headers, status, statusText } = response;
    const type = headers.get("content-type") ?? "";
    const size = headers.get("content-length");
    if (body === null || /^text\/event-stream/i.test(type) || Number(size ?? 0) > LARGEST_ANSWER) return response;
    let bytes: Uint8Array<ArrayBuffer>;
    try {
      bytes = await readAll(body.getReader(), ms);
    } catch (error) {
      if (response.ok) throw apiError(error);
      return new Response(null, { status, statusText, headers }); // its status says what matters
    }
    if (response.ok && size !== "0" && /^application\/([^;]*\+)?json\b/i.test(type) && !isJson(bytes)) {
      throw new APIConnectionError({ message: "an answer that is not JSON, or half of one" });
    }
    return new Response(bytes, { status, statusText, headers });
  };
}

async function readAll(reader: Reader, ms: number): Promise<Uint8Array<ArrayBuffer>> {
  const until = Date.now() + ms;
  const chunks: Uint8Array<ArrayBuffer>[] = [];
  for (;;) {
    const { done, value } = await readNext(reader, until - Date.now());
    if (done) return new Uint8Array(await new Blob(chunks).arrayBuffer());
    chunks.push(value);
  }
}

type Reader = ReadableStreamDefaultReader<Uint8Array<ArrayBuffer>>;

/** The next piece of an answer. Throws `APIConnectionError` when it breaks off, or when nothing comes for `ms`. */
export async function readNext(reader: Reader, ms: number): Promise<ReadableStreamReadResult<Uint8Array<ArrayBuffer>>> {
  let timer: ReturnType<typeof setTimeout> | null = null;
  const late = new Promise<"late">((resolve) => {
    timer = setTimeout(() => resolve("late"), ms);
  });
  try {
    const part = await Promise.race([reader.read(), late]);
    if (part !== "late") return part;
  } catch (error) {
    throw new APIConnectionError({
      message: "the answer broke off",
      ...(error instanceof Error ? { cause: error } : {}),
    });
  } finally {
    clearTimeout(timer);
  }
  void reader.cancel().catch(() => undefined);
  throw new APIConnectionError({ message: "the answer stalled" });
}

function isJson(bytes: Uint8Array): boolean {
  try {
    JSON.parse(new TextDecoder().decode(bytes));
    return true;
  } catch {
    return false;
  }
}

/** A client with one credential. It reads nothing from an environment, and its logger is silent: we log ourselves. */
export function openClient(token: string, baseURL: string, options: ClientOptions): Anthropic {
  return new Anthropic({
    apiKey: null,
    authToken: token,
    webhookKey: null,
    baseURL,
    logLevel: "off",
    ...options,
    middleware: [...(options.middleware ?? []), wholeAnswers(options.timeout), refusePages],
  });
}

/** The status the API answered with; undefined when it did not answer. */
export function statusOf(error: unknown): number | undefined {
  return error instanceof APIError && typeof error.status === "number" ? error.status : undefined;
}

export function isStatus(error: unknown, ...statuses: number[]): boolean {
  const status = statusOf(error);
  return status !== undefined && statuses.includes(status);
}

/** Passes an error of the API or of the way to it, and throws anything else on: that is a bug. */
export function apiError(error: unknown): APIError {
  if (error instanceof APIError) return error;
  throw error;
}

/** What an error is called in a log: its class, and the API's status. */
export function errorLabel(error: unknown): string {
  const status = statusOf(error);
  const name = error instanceof Error ? error.constructor.name : typeof error;
  return status === undefined ? name : `${name} ${status}`;
}
