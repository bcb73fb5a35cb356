/** The SDK's clients as we use them, and what its errors tell. */

import Anthropic, { APIConnectionError, APIError, type Middleware } from "@anthropic-ai/sdk";

/** For one call whose outcome we decide ourselves. */
export const CALL_TIMEOUT_MS = 10_000;
/** Of one request; the SDK's own default. */
export const MAX_RETRIES = 2;

export interface ClientOptions {
  readonly maxRetries: number;
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

/** A client with one credential. It reads nothing from an environment, and its logger is silent: we log ourselves. */
export function openClient(token: string, baseURL: string, options: ClientOptions): Anthropic {
  return new Anthropic({
    apiKey: null,
    authToken: token,
    webhookKey: null,
    baseURL,
    logLevel: "off",
    ...options,
    middleware: [...(options.middleware ?? []), refusePages],
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
