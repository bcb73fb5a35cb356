/**
 * Log lines: key=value with a fixed set of keys for hosts, one JSON object a line for runners; no secret in either (secrets.ts).
 *
 * A vendor's error is logged by its name (`error=`), never by its text: the text can embed requests and tokens.
 */

import { patternOf, redact } from "./secrets.ts";

const KEYS = ["action", "provider", "session", "work", "sandbox", "attempt", "ms", "error", "reason"] as const;

/** What a line may say besides its action. */
export type LogValues = Partial<Record<Exclude<(typeof KEYS)[number], "action">, unknown>>;

// Printable ASCII without space, quote and equals sign: ends no line, moves no cursor.
const PLAIN = /^[!#-<>-~]+$/;

/** One log line: `action=launched session=sesn_1 ms=812`. */
export function line(action: string, values: LogValues = {}): string {
  const pairs: Record<string, unknown> = { action, ...values };
  return KEYS.filter((key) => pairs[key] !== undefined && pairs[key] !== null)
    .map((key) => `${key}=${shown(pairs[key])}`)
    .join(" ");
}

/** The type of what was thrown, for `error=`. */
export function errorName(error: unknown): string {
  if (!(error instanceof Error)) return typeof error;
  // The SDK's errors share the name of their base class; the class says more.
  return error.name === "Error" ? error.constructor.name : error.name;
}

function shown(value: unknown): string {
  const text = value instanceof Error ? errorName(value) : redact(String(value));
  return PLAIN.test(text) ? text : JSON.stringify(text);
}

/** Where the lines go: the console, whose level the platform shows. */
export const log = {
  info(action: string, values?: LogValues): void {
    console.info(line(action, values));
  },
  warning(action: string, values?: LogValues): void {
    console.warn(line(action, values));
  },
  error(action: string, values?: LogValues): void {
    console.error(line(action, values));
  },
};

/** One line of a runner: ready, claimed, tool, retry, handover, exit. */
export type Emit = (event: string, values?: Record<string, string | number | boolean>) => void;

/** A runner's lines, each naming its session: many runners share one log. None shows `token`, whatever it looks like. */
export function runnerLog(session: string, token = ""): Emit {
  const own = patternOf(token);
  const clean = (_: string, value: unknown): unknown => (typeof value === "string" ? redact(value, own) : value);
  return (event, values) => console.info(JSON.stringify({ event, session, ...values }, clean));
}
