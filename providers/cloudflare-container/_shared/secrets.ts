/**
 * Keeps secrets out of whatever is written, by the rules of the Python core: the one place that does.
 *
 * Two ways lead to a secret. Some have a shape: our control plane's keys, JSON in base64, a JWT, a password in an address.
 * Others do not, such as a password of your choice, so whoever reads a secret says what it is (`hide`). Both are found
 * plain, in base64, percent-encoded and JSON-escaped, and where a line break goes through them.
 */

export const REDACTED = "[redacted]";
const SHORTEST = 8; // a shorter value is a word that other texts have too
const MOST_KNOWN = 32; // a Worker has a handful
const BREAK = String.raw`(?:\\+[rn]|[\r\n])[ \t|]*`; // a line's end, as it is or as JSON writes it, and an indent
const CHARACTER = String.raw`(?:[\w.+/=%\-]|\\+/)`; // of a credential, in any of its spellings
const PREFIXES = ["sk-ant-", "whsec_", "eyJhbGciOi", "eyJ0eXAiOi", "eyJraWQiOi", "eyJzZXNzaW9uc190b2tlbi"]; // the last: a work item's secret

const SHAPES = new RegExp(
  // What begins like a credential, up to its end, and the lines that are nothing but more of it.
  `(?:${PREFIXES.flatMap((prefix) => [prefix, inHex(prefix), ...inBase64(prefix)])
    .map((mark) => [...mark].map(quoted).join(`(?:${BREAK})*`))
    .join("|")}|\\beyJ(?=[\\w\\-]{6}))${CHARACTER}*(?:(?:${BREAK})+${CHARACTER}+(?=[\\r\\n\\\\"']|$))*` +
    `|(?<=://)[^\\s/@"'\\\\]+(?=@)`, // a name and a password in an address
  "g",
);
const NAMED =
  /((?:\bbearer\s+|\bbasic\s+|\b(?:proxy-)?authorization["']?\s*[:=]\s*["']?|\bx-api-key["']?\s*[:=]\s*["']?|[?&;][\w.-]*(?:sig|token|secret|key|password|credential)[\w.-]*=)(?:bearer\s+|basic\s+)?)[^\s"'&#;,]+/gi;

const known = new Map<string, RegExp>();

/** From now on `redact` knows this value as a secret, whatever it looks like. Too short a one it cannot tell from ordinary text. */
export function hide(secret: string): void {
  if (secret.length < SHORTEST || known.has(secret)) return;
  known.set(secret, spellings(secret));
  const [oldest] = known.keys();
  if (known.size > MOST_KNOWN && oldest !== undefined) known.delete(oldest);
}

/** `text` without any secret. `own`: one that only the caller has, such as a session's token. */
export function redact(text: string, own?: RegExp): string {
  let clean = own === undefined ? text : text.replace(own, REDACTED);
  for (const pattern of known.values()) clean = clean.replace(pattern, REDACTED);
  return clean.replace(SHAPES, REDACTED).replace(NAMED, (_, before: string) => before + REDACTED);
}

/** What finds `secret` in all of its spellings; undefined when it is too short to tell. */
export function patternOf(secret: string): RegExp | undefined {
  return secret.length < SHORTEST ? undefined : spellings(secret);
}

function spellings(secret: string): RegExp {
  const found = [...new Set([secret, percentEncoded(secret), ...inBase64(secret)])];
  found.sort((one, other) => other.length - one.length);
  return new RegExp(found.map((spelling) => [...spelling].map(escaped).join(`(?:${BREAK})*`)).join("|"), "g");
}

/** One character of a secret, with what JSON and its like put before it. */
function escaped(character: string): string {
  if (character === "\n") return BREAK;
  if (character === "\\") return "\\\\+";
  return `"'/`.includes(character) ? `\\\\*${quoted(character)}` : quoted(character);
}

function quoted(character: string): string {
  return character.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&");
}

function percentEncoded(text: string): string {
  return encodeURIComponent(text).replace(/[!'()*]/g, (char) => `%${char.charCodeAt(0).toString(16).toUpperCase()}`);
}

function inHex(text: string): string {
  return [...text].map((char) => char.charCodeAt(0).toString(16)).join("");
}

/** The characters that stand for all of `text` in the base64 of whatever contains it. */
function inBase64(text: string): string[] {
  const bytes = new TextEncoder().encode(text);
  return [0, 1, 2].flatMap((before) => {
    const padded = new Uint8Array([...new Uint8Array(before), ...bytes, 0, 0]);
    const encoded = btoa(String.fromCharCode(...padded));
    const part = encoded.slice(Math.ceil((before * 8) / 6), Math.floor(((before + bytes.length) * 8) / 6));
    return [part, part.replaceAll("+", "-").replaceAll("/", "_")];
  });
}
