/**
 * The host seam: one HTTP request in, one reply out, at once (P6, P7). The only place that decides a webhook's status.
 *
 * A webhook says that there is work; it carries none. So a verified one wakes the drain and is answered, whatever the
 * queue holds, and a repeated one is simply another wake-up, which the drain coalesces.
 */

import { WebhookRejected } from "./errors.ts";
import { log } from "./log.ts";
import type { Verifier, WebhookEvent } from "./webhook.ts";

export const MAX_BODY_BYTES = 64 * 1024; // a webhook is thin; a real one has a few hundred bytes
const SIGNATURE_HEADERS = ["webhook-id", "webhook-timestamp", "webhook-signature"];
const WAKING = new Set(["session.status_run_started"]);
const SUSPICIOUS = new Set(["session.status_idled"]); // a session that waits for a call is idle, too

/**
 * Answers one request to the webhook URL. `wake` must return at once: it starts a drain and does not wait. `suspect` is told
 * which sessions healing may look at first.
 */
export async function handle(
  request: Request,
  verifier: Verifier,
  wake: (event: WebhookEvent) => void,
  suspect?: (event: WebhookEvent) => void,
): Promise<Response> {
  if (request.method !== "POST") return refuse(405, "only POST is answered here", { allow: "POST" });
  if (SIGNATURE_HEADERS.some((name) => !request.headers.get(name))) {
    return refuse(401, "the webhook signature is missing");
  }
  const body = await bodyOf(request);
  if (body === undefined) return refuse(413, "the body is too large");
  let event: WebhookEvent;
  try {
    event = verifier.verify(body, request.headers);
  } catch (error) {
    if (error instanceof WebhookRejected) return refuse(401, error.message);
    throw error;
  }
  if (SUSPICIOUS.has(event.type) && suspect !== undefined) {
    suspect(event);
    return reply(200, { ok: true });
  }
  if (!WAKING.has(event.type)) return reply(200, { ok: true, ignored: event.type });
  log.info("webhook", { session: event.sessionId });
  wake(event);
  return reply(200, { ok: true });
}

/** The body, or undefined when it is larger than a webhook can be: the rest is not read. */
async function bodyOf(request: Request): Promise<Uint8Array | undefined> {
  if (Number(request.headers.get("content-length") ?? 0) > MAX_BODY_BYTES) return undefined;
  const chunks: Uint8Array[] = [];
  let length = 0;
  const reader = request.body?.getReader();
  for (;;) {
    const chunk = await reader?.read();
    if (chunk === undefined || chunk.done) break;
    length += chunk.value.byteLength;
    if (length > MAX_BODY_BYTES) {
      await reader?.cancel();
      return undefined;
    }
    chunks.push(chunk.value);
  }
  const body = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    body.set(chunk, at);
    at += chunk.byteLength;
  }
  return body;
}

/** A refusal that is logged. Its reason is ours, never the request's. */
export function refuse(status: number, reason: string, headers: Record<string, string> = {}): Response {
  log.warning("refused", { reason: `${status} ${reason}` });
  return reply(status, { error: reason }, headers);
}

function reply(status: number, payload: Record<string, unknown>, headers: Record<string, string> = {}): Response {
  return Response.json(payload, { status, headers });
}
