/**
 * The middleware between the SDK's tool runner and the API: it hears every event before the runner does, and keeps back
 * results that must not be sent as they are (R5).
 */

import { APIConnectionError, type Middleware } from "@anthropic-ai/sdk";
import { readNext } from "./api.ts";
import type { EventLog, ResultEvent, SessionEvent } from "./events.ts";

const SILENCE_MS = 90_000; // the server sends pings between the events; a stream without any is dead

/** What becomes of a result: sent; kept for after the stop; dropped, because another runner answers now. */
export type ResultFate = "send" | "hold" | "drop";

export interface Hearing {
  readonly log: EventLog;
  fate(): ResultFate;
  hold(events: ResultEvent[]): void;
  /** Ends the streams that are open. */
  over(): AbortSignal;
  /** How long a stream may be silent, in milliseconds; another time for tests. */
  readonly silenceMs?: number;
}

export function hearing(heard: Hearing): Middleware {
  return async (request, next) => {
    const { pathname } = new URL(request.url);
    if (request.method === "POST" && pathname.endsWith("/events")) {
      const fate = heard.fate();
      if (fate === "send") return next(request);
      if (fate === "hold") heard.hold((JSON.parse(String(request.body)) as { events: ResultEvent[] }).events);
      return Response.json({ data: [] });
    }
    const response = await next(request);
    if (request.method !== "GET" || !response.ok) return response;
    if (pathname.endsWith("/events")) return heardPage(response, heard.log);
    if (pathname.endsWith("/events/stream")) return heardStream(response, heard);
    return response;
  };
}

/** Notes a page, and takes out what the runner must not see. */
async function heardPage(response: Response, log: EventLog): Promise<Response> {
  const page = (await response.json()) as { data: SessionEvent[]; next_page?: string | null };
  for (const event of page.data) log.note(event);
  if (!page.next_page) log.readings += 1;
  const headers = new Headers(response.headers);
  for (const name of ["content-length", "content-encoding"]) headers.delete(name);
  return Response.json({ ...page, data: page.data.filter((event) => !log.isSettled(event)) }, { headers });
}

/**
 * Notes each frame as the runner reads it.
 *
 * The runner opens a stream, lists what came before, and reads on. When that list fails it reads on all the same, and would
 * never see a call made before: such a stream breaks, so that it connects, and lists, again.
 */
function heardStream(response: Response, heard: Hearing): Response {
  const { log, silenceMs = SILENCE_MS } = heard;
  const over = heard.over();
  const reader = response.body?.getReader();
  if (reader === undefined) return response;
  const before = log.readings;
  const frames = new Frames();
  const body = new ReadableStream<Uint8Array>(
    {
      start(controller) {
        // The SDK aborts the request it made, which is not always heard: it lets go of that request's signal once the garbage
        // collector takes the response's `body`, and some runtimes let it be taken while it is read.
        const end = (): void => {
          controller.error(over.reason);
          void reader.cancel(over.reason).catch(() => undefined);
        };
        if (over.aborted) end();
        else over.addEventListener("abort", end, { once: true });
      },
      async pull(controller) {
        for (;;) {
          const { done, value } = await readNext(reader, silenceMs);
          if (done) return controller.close(); // within a frame: the SDK would not use half of one either
          const piece = frames.add(value);
          if (piece === undefined) continue;
          for (const event of piece.events) {
            if (log.readings === before) {
              await reader.cancel();
              return controller.error(new APIConnectionError({ message: "the event log was not read" }));
            }
            log.note(event);
          }
          return controller.enqueue(piece.bytes);
        }
      },
      cancel: (reason) => reader.cancel(reason),
    },
    { highWaterMark: 0 }, // nothing is read ahead of the runner
  );
  return new Response(body, { status: response.status, headers: response.headers });
}

/**
 * Server-sent events out of chunks that end anywhere. Only the `data` of complete frames is of interest.
 *
 * A frame is handed on in one piece, because the SDK looks through all it has with every piece it gets: an event of many
 * megabytes in small ones would keep the isolate busy for as long as an agent likes.
 */
class Frames {
  readonly #decoder = new TextDecoder();
  #chunks: Uint8Array[] = [];
  #texts: string[] = [];
  #end = "";

  /** The bytes up to the end of `chunk` and the events in them, once a frame is complete. */
  add(chunk: Uint8Array): { bytes: Uint8Array; events: SessionEvent[] } | undefined {
    const text = this.#decoder.decode(chunk, { stream: true });
    this.#chunks.push(chunk);
    this.#texts.push(text);
    const isComplete = /\n\r?\n/.test(this.#end + text);
    this.#end = (this.#end + text).slice(-2);
    if (!isComplete) return undefined;
    const frames = this.#texts.join("").split(/\r?\n\r?\n/);
    const bytes = joined(this.#chunks);
    this.#chunks = [];
    this.#texts = [frames.pop() ?? ""];
    const events = frames.flatMap((frame) => {
      const lines = frame.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      return parsed(lines.map((line) => line.slice("data:".length)).join("\n"));
    });
    return { bytes, events };
  }
}

function joined(chunks: readonly Uint8Array[]): Uint8Array {
  const bytes = new Uint8Array(chunks.reduce((size, chunk) => size + chunk.byteLength, 0));
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.byteLength;
  }
  return bytes;
}

function parsed(data: string): SessionEvent[] {
  try {
    const event: unknown = JSON.parse(data);
    return typeof event === "object" && event !== null && "type" in event ? [event as SessionEvent] : [];
  } catch {
    return []; // a ping, or a frame the SDK will complain about itself
  }
}
