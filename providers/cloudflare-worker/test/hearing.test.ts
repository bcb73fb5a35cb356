/** What the SDK's tool runner gets to see of a session's events. */

import { APIConnectionError } from "@anthropic-ai/sdk";
import { describe, expect, it } from "vitest";
import { EventLog } from "../_shared/events.ts";
import { hearing } from "../_shared/hearing.ts";

const URL_OF_EVENTS = "https://api.example/v1/sessions/sesn_1/events";

/** The pieces in which a stream arrives that the server sends in `chunks`, and what was noted of it. */
async function heard(
  chunks: Uint8Array[],
  log = new EventLog(),
  isListed = true,
  isSilent = false,
): Promise<Uint8Array[]> {
  const middleware = hearing({
    log,
    fate: () => "send",
    hold: () => undefined,
    over: () => new AbortController().signal,
    silenceMs: 50,
  });
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      if (!isSilent) controller.close();
    },
  });
  const request = new Request(`${URL_OF_EVENTS}/stream`);
  const response = await middleware(request as never, (async () => new Response(body)) as never, {} as never);
  if (isListed) log.readings += 1; // the runner lists what came before
  const pieces: Uint8Array[] = [];
  const reader = response.body?.getReader();
  for (;;) {
    const part = await reader?.read();
    if (part === undefined || part.done) return pieces;
    pieces.push(part.value);
  }
}

function cut(text: string, size: number): Uint8Array[] {
  const bytes = new TextEncoder().encode(text);
  return Array.from({ length: Math.ceil(bytes.length / size) }, (_, n) => bytes.slice(n * size, (n + 1) * size));
}

function frame(id: string, more: object = {}): string {
  const event = { type: "agent.tool_use", id, name: "write", processed_at: "2026-01-01T00:00:00Z", ...more };
  return `event: message\r\ndata: ${JSON.stringify(event)}\r\n\r\n`;
}

describe("a stream of events", () => {
  it("is heard whole, wherever its chunks end", async () => {
    const text = `: ping\n\n${frame("call_1", { input: { content: "ü\n\n" } })}${frame("call_2")}`;
    for (const size of [1, 2, 3, 7, 10_000]) {
      const log = new EventLog();
      const pieces = await heard(cut(text, size), log);
      expect(new TextDecoder().decode(await new Blob(pieces as Uint8Array<ArrayBuffer>[]).arrayBuffer())).toBe(text);
      expect([...log.open.keys()]).toEqual(["call_1", "call_2"]);
    }
  });

  it("hands an event on in one piece, however large it is and however small its chunks are", async () => {
    const text = frame("call_1", { input: { content: "x".repeat(4 * 1024 * 1024) } });
    const pieces = await heard(cut(text, 4096));
    expect(pieces.map((piece) => piece.byteLength)).toEqual([text.length]);
  });

  it("breaks when it has been silent for long: its end was lost on the way", async () => {
    const log = new EventLog();
    await expect(heard(cut(frame("call_1"), 100), log, true, true)).rejects.toBeInstanceOf(APIConnectionError);
    expect([...log.open.keys()]).toEqual(["call_1"]);
  });

  it("breaks when what came before could not be listed: its calls would never be seen", async () => {
    await expect(heard(cut(frame("call_1"), 100), new EventLog(), false)).rejects.toThrow("the event log was not read");
  });
});
