/**
 * Webhook signatures: the SDK's own check, with what it leaves open closed.
 *
 * Keys come as base64 in either alphabet, padded or not; the library underneath takes one of those forms. And it throws
 * several kinds of error for a malformed signature, all of which mean "rejected".
 */

import Anthropic from "@anthropic-ai/sdk";
import { SettingsError, WebhookRejected } from "./errors.ts";

const PREFIX = "whsec_";
const KEY_BYTES = 32; // documented

/** What a webhook says: something happened to a session. Thin by design; the queue holds the work. */
export interface WebhookEvent {
  readonly id: string;
  readonly type: string;
  readonly sessionId: string;
}

/** The signing key in the one form the library decodes in full. Throws `SettingsError`, never quoting the key. */
export function normaliseKey(key: string): string {
  const encoded = key
    .trim()
    .replace(/^whsec_/, "")
    .replaceAll("-", "+")
    .replaceAll("_", "/")
    .replace(/=+$/, "");
  if (!/^[A-Za-z0-9+/]*$/.test(encoded) || encoded.length % 4 === 1) {
    throw new SettingsError("the webhook signing key is not base64: copy it again, from whsec_ on");
  }
  const bytes = atob(encoded);
  if (bytes.length !== KEY_BYTES) {
    throw new SettingsError(`the webhook signing key has ${bytes.length} bytes instead of ${KEY_BYTES}: copy it again`);
  }
  return PREFIX + btoa(bytes);
}

/** Checks webhooks against our keys, the current one first; during a rotation there are two. */
export class Verifier {
  readonly #keys: readonly string[];
  // The SDK offers its check on a client only. This one sends nothing.
  readonly #webhooks = new Anthropic({ apiKey: null, authToken: "unused", baseURL: "http://unused.invalid" }).beta
    .webhooks;

  /** Throws `SettingsError` when there is no key, or an unusable one. */
  constructor(keys: readonly string[]) {
    if (keys.length === 0) {
      throw new SettingsError(
        "ANTHROPIC_WEBHOOK_SIGNING_KEY is not set: without it nothing tells a webhook from a stranger",
      );
    }
    this.#keys = keys.map(normaliseKey);
  }

  /** The event in `body`, signed by one of our keys less than five minutes ago. Throws `WebhookRejected`. */
  verify(body: Uint8Array, headers: Headers): WebhookEvent {
    let text: string;
    try {
      text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(body);
    } catch {
      throw new WebhookRejected("the body is not UTF-8");
    }
    const named = Object.fromEntries(headers);
    for (const key of this.#keys) {
      let event: unknown;
      try {
        event = this.#webhooks.unwrap(text, { headers: named, key });
      } catch {
        continue; // it does nothing but check and parse: whatever it throws, this is not ours
      }
      const data = field(event, "data");
      return { id: str(field(event, "id")), type: str(field(data, "type")), sessionId: str(field(data, "id")) };
    }
    throw new WebhookRejected("no key of ours signed this, or it is stale");
  }
}

function field(value: unknown, name: string): unknown {
  return typeof value === "object" && value !== null ? (value as Record<string, unknown>)[name] : undefined;
}

function str(value: unknown): string {
  return typeof value === "string" ? value : "";
}
