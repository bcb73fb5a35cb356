/**
 * Log lines: key=value with a fixed set of keys for hosts, one JSON object a line for runners; secrets taken out of both.
 *
 * A vendor's error is logged by its name (`error=`), never by its text: the text can embed requests and tokens.
 */

const KEYS = ["action", "provider", "session", "work", "sandbox", "attempt", "ms", "error", "reason"] as const;

/** What a line may say besides its action. */
export type LogValues = Partial<Record<Exclude<(typeof KEYS)[number], "action">, unknown>>;

// Printable ASCII without space, quote and equals sign: ends no line, moves no cursor.
const PLAIN = /^[!#-<>-~]+$/;
// API, environment and sessions keys; webhook keys; base64 of a JSON object (a work item's secret, a JWT); bearers.
const SECRETS = /sk-ant-[\w.-]+|whsec_[\w+/=-]+|\beyJ[\w+/=-]{20,}(?:\.[\w-]+)*|(?<=bearer )\S+/gi;

/** `text` without anything that has the shape of one of our credentials. */
export function redact(text: string): string {
  return text.replace(SECRETS, "[redacted]");
}

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
  const text = value instanceof Error ? errorName(value) : String(value);
  return PLAIN.test(text) ? text : JSON.stringify(text);
}

/** Where the lines go: the console, whose level the platform shows. */
export const log = {
  info(action: string, values?: LogValues): void {
    console.info(redact(line(action, values)));
  },
  warning(action: string, values?: LogValues): void {
    console.warn(redact(line(action, values)));
  },
  error(action: string, values?: LogValues): void {
    console.error(redact(line(action, values)));
  },
};

/** One line of a runner: ready, claimed, tool, retry, handover, exit. */
export type Emit = (event: string, values?: Record<string, string | number | boolean>) => void;

/** A runner's lines, each naming its session: many runners share one log. */
export function runnerLog(session: string): Emit {
  return (event, values) => console.info(redact(JSON.stringify({ event, session, ...values })));
}
