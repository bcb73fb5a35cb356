/**
 * Searching the files with a linear-time engine: the agent chooses the pattern and the text, so no pair of them may be slow.
 *
 * The syntax is RE2's, as ripgrep's nearly is: no look-around and no back-references. The work is bounded besides, by the
 * number of characters times the size of the compiled pattern, and other sessions of the isolate get their turn in between.
 */

import { RE2JS, RE2JSException } from "re2js";
import type { Files } from "./files.ts";

const OUTPUT_LIMIT = 100 * 1024; // the SDK's
const MAX_LINE_LENGTH = 2000; // the SDK's; longer lines are skipped
const MAX_PATTERN = 1000;
const MAX_STEPS = 400_000_000; // about a second of work at the usual speed, several at the worst
const STEPS_PER_TURN = 20_000_000;
const LINE_END = /\r?\n|\r(?!\n)|\u2028|\u2029/;

/** The pattern cannot be used. Its message says why. */
export class BadRegex extends Error {
  override name = "BadRegex";
}

/** Lines that match, as `path:number:line`. Throws `BadRegex`. */
export async function grep(files: Files, pattern: string, root: string, signal: AbortSignal): Promise<string> {
  const regex = compiled(pattern);
  const cost = Math.max(1, regex.programSize());
  const found: string[] = [];
  let room = OUTPUT_LIMIT;
  let steps = 0;
  let turn = STEPS_PER_TURN;
  for (const { path } of files.files(root)) {
    if (isNoise(path.slice(root.length))) continue;
    for (const [index, line] of linesOf(files, path)) {
      const isSkipped = line.length > MAX_LINE_LENGTH;
      steps += (line.length + 1) * (isSkipped ? 1 : cost);
      if (steps > MAX_STEPS) return [...found, "[the search was cut short: narrow the pattern or the path]"].join("\n");
      if (isSkipped || !regex.test(line)) continue;
      const hit = `${path}:${index + 1}:${line}`;
      room -= hit.length + 1;
      if (room < 0) return [...found, `[output truncated at ${OUTPUT_LIMIT} bytes]`].join("\n");
      found.push(hit);
    }
    if (steps > turn) {
      turn = steps + STEPS_PER_TURN;
      await new Promise((resolve) => setTimeout(resolve, 0));
      if (signal.aborted) break;
    }
  }
  return found.length === 0 ? "no matches" : found.join("\n");
}

/** Whether a path below a search root is in a directory that searches leave out. */
export function isNoise(path: string): boolean {
  return path.split("/").some((name) => name === ".git" || name === "node_modules");
}

function compiled(pattern: string): RE2JS {
  if (pattern.length > MAX_PATTERN) throw new BadRegex(`longer than ${MAX_PATTERN} characters`);
  try {
    return RE2JS.compile(pattern);
  } catch (error) {
    if (error instanceof RE2JSException) throw new BadRegex(error.message);
    throw error;
  }
}

/** The lines of a file, as far as it is text: what follows a NUL is not looked at. */
function linesOf(files: Files, path: string): Iterable<[number, string]> {
  const bytes = files.read(path);
  const end = bytes.indexOf(0);
  if (end === 0) return [];
  const text = new TextDecoder("utf-8", { fatal: false, ignoreBOM: true }).decode(
    end < 0 ? bytes : bytes.subarray(0, end),
  );
  const lines = text.split(LINE_END);
  if (end >= 0)
    lines.pop(); // the line that the NUL is in
  else if (lines.at(-1) === "") lines.pop();
  return lines.entries();
}
