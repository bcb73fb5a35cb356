/** The SDK's clients as we use them, and what its errors tell. */

import Anthropic, { APIError, type Middleware } from "@anthropic-ai/sdk";

/** For one call whose outcome we decide ourselves. */
export const CALL_TIMEOUT_MS = 10_000;
/** Of one request; the SDK's own default. */
export const MAX_RETRIES = 2;

export interface ClientOptions {
  readonly maxRetries: number;
  readonly timeout: number;
  readonly middleware?: Middleware[];
}

/** A client with one credential. It reads nothing from an environment, and its logger is silent: we log ourselves. */
export function openClient(token: string, baseURL: string, options: ClientOptions): Anthropic {
  return new Anthropic({ apiKey: null, authToken: token, webhookKey: null, baseURL, logLevel: "off", ...options });
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
