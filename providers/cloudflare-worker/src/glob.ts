/**
 * Glob patterns as linear-time regular expressions: `*`, `?`, `[a-z]`, `{a,b}` and `**`, where the agent's pattern cannot make
 * the search slow.
 */

import { RE2JS } from "re2js";

const MAX_PATTERN = 1000;
const MAX_ALTERNATIVES = 200;
const MAX_STEPS = 400_000_000; // characters times the size of the compiled pattern: about a second of work

/** The pattern cannot be used. */
export class BadPattern extends Error {
  override name = "BadPattern";
}

/** Says whether a path relative to the search root matches. Throws `BadPattern`; so does asking it for too much work. */
export function globMatcher(pattern: string): (path: string) => boolean {
  if (pattern.length > MAX_PATTERN) throw new BadPattern(`the pattern is longer than ${MAX_PATTERN} characters`);
  const alternatives = expandBraces(pattern).map(regexOf);
  const regex = RE2JS.compile(alternatives.join("|"), RE2JS.DOTALL);
  const cost = Math.max(1, regex.programSize());
  let steps = 0;
  return (path) => {
    steps += (path.length + 1) * cost;
    if (steps > MAX_STEPS) throw new BadPattern("too much work for so many files: narrow the pattern or the path");
    return regex.matches(path);
  };
}

/** `a{b,c}` as `ab`, `ac`; braces without a comma mean themselves. */
function expandBraces(pattern: string): string[] {
  const done: string[] = [];
  let left = [pattern];
  while (left.length > 0) {
    const next: string[] = [];
    for (const each of left) {
      const group = firstGroup(each);
      if (group === undefined) done.push(each);
      else for (const part of group.parts) next.push(group.before + part + group.after);
    }
    if (done.length + next.length > MAX_ALTERNATIVES) {
      throw new BadPattern(`the pattern has more than ${MAX_ALTERNATIVES} alternatives`);
    }
    left = next;
  }
  return done;
}

function firstGroup(pattern: string): { before: string; parts: string[]; after: string } | undefined {
  for (let start = pattern.indexOf("{"); start >= 0; start = pattern.indexOf("{", start + 1)) {
    const parts = [""];
    let depth = 0;
    for (let at = start + 1; at < pattern.length; at += 1) {
      const char = pattern.charAt(at);
      if (char === "}" && depth === 0) {
        if (parts.length > 1) return { before: pattern.slice(0, start), parts, after: pattern.slice(at + 1) };
        break;
      }
      if (char === "," && depth === 0) {
        parts.push("");
        continue;
      }
      depth += char === "{" ? 1 : char === "}" ? -1 : 0;
      parts.push((parts.pop() ?? "") + char);
    }
  }
  return undefined;
}

function regexOf(pattern: string): string {
  const segments = pattern.split("/").filter((segment) => segment !== "" && segment !== ".");
  let regex = "";
  segments.forEach((segment, index) => {
    const isLast = index === segments.length - 1;
    // As everywhere, what begins with a dot is found by its name only: `**` passes it by.
    if (segment === "**") regex += isLast ? "(?:[^./][^/]*/)*[^./][^/]*" : "(?:[^./][^/]*/)*";
    else regex += segmentRegex(segment) + (isLast ? "" : "/");
  });
  return `(?:${regex})`;
}

function segmentRegex(segment: string): string {
  const chars = [...segment];
  let regex = "";
  for (let at = 0; at < chars.length; at += 1) {
    const char = chars[at] ?? "";
    const end = char === "[" ? chars.indexOf("]", at + 2) : -1;
    if (char === "*") {
      while (chars[at + 1] === "*") at += 1;
      const isAll = regex === "" && [undefined, "."].includes(chars[at + 1]); // nothing would leave a leading dot to the rest
      regex += regex !== "" ? "[^/]*" : isAll ? "[^./][^/]*" : "(?:[^./][^/]*)?";
    } else if (char === "?") regex += regex === "" ? "[^./]" : "[^/]";
    else if (end > 0) {
      const isNegated = ["!", "^"].includes(chars[at + 1] ?? "");
      const members = chars.slice(at + (isNegated ? 2 : 1), end).join("");
      regex += `[${isNegated ? "^/" : ""}${members.replace(/[\\[\]^&~]/g, "\\$&")}]`;
      at = end;
    } else regex += RE2JS.quote(char);
  }
  return regex;
}
