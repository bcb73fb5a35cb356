/**
 * The agent toolset over the session's files: the input schemas, the rules and the words of the SDK's own
 * `agent_toolset_20260401`, which needs a disk and a shell. There is no shell here, so `bash` says what to use instead.
 */

import { ToolError } from "@anthropic-ai/sdk/lib/tools/ToolError";
import type { OwnTool } from "../_shared/guard.ts";
import { byteLength, FileError, type Files, isWithin, resolvePath, WORKDIR } from "./files.ts";
import { BadPattern, globMatcher } from "./glob.ts";
import { BadRegex, grep, isNoise } from "./grep.ts";

const READ_LIMIT = 256 * 1024; // the SDK's default, for a whole-file read and for an edit
const GLOB_RESULTS = 200; // the SDK's
export const NO_SHELL =
  "bash: this sandbox has no shell and runs no programs. Use the file tools instead: read, write and edit for files, glob to" +
  " list them, grep to search them.";

type Input = Record<string, unknown>;

/** Directories outside the workdir that the tools may reach. */
export interface Mount {
  readonly root: string;
  readonly isReadOnly: boolean;
}

export function agentTools(files: Files, mounts: () => readonly Mount[]): OwnTool[] {
  const place = (path: string): string => {
    const absolute = resolvePath(path);
    const roots = mounts();
    if (isWithin(WORKDIR, absolute) || roots.some((mount) => isWithin(mount.root, absolute))) return absolute;
    const permitted = roots.length > 0 ? "working directory and its other permitted directories" : "working directory";
    throw new ToolError(`path ${JSON.stringify(path)} is outside the session's ${permitted}`);
  };
  const placeToChange = (tool: string, path: string): string => {
    const absolute = place(path);
    const closed = mounts().find((mount) => mount.isReadOnly && isWithin(mount.root, absolute));
    if (closed) throw new ToolError(`${tool}: ${path} is inside read-only directory ${closed.root}`);
    return absolute;
  };

  return [
    {
      name: "bash",
      description: "Run a shell command. There is no shell here: it answers with what to use instead.",
      input_schema: {
        type: "object",
        properties: {
          command: { type: "string", description: "The command to run" },
          restart: { type: "boolean", description: "Restart the persistent shell before running" },
          timeout_ms: { type: "integer", description: "Per-call timeout in milliseconds" },
        },
      },
      changes: false,
      run: () => {
        throw new ToolError(NO_SHELL);
      },
    },
    {
      name: "read",
      description: "Read a UTF-8 text file relative to the workdir.",
      input_schema: {
        type: "object",
        properties: {
          file_path: { type: "string" },
          view_range: {
            type: "array",
            items: { type: "integer" },
            description: "[start_line, end_line] 1-indexed inclusive",
          },
        },
        required: ["file_path"],
      },
      changes: false,
      run: (input) => {
        const path = text("read", input, "file_path");
        const range = rangeOf(input["view_range"]);
        const absolute = place(path);
        return told("read", path, () => {
          const stat = files.stat(absolute);
          if (stat !== undefined && !stat.isFile) throw new ToolError(`read: ${path} is not a regular file`);
          if (stat !== undefined && stat.size > READ_LIMIT) {
            if (range !== undefined) return largeRange(files, absolute, path, range);
            throw new ToolError(
              `read: ${path} is ${stat.size} bytes, exceeds ${READ_LIMIT}-byte limit. ` +
                "Use the view_range parameter to read specific line ranges, e.g. view_range: [1, 500].",
            );
          }
          const content = decoded(files.read(absolute));
          if (range === undefined) return content;
          const lines = content.split("\n");
          return lines.slice(Math.max(0, range[0] - 1), range[1] > 0 ? range[1] : lines.length).join("\n");
        });
      },
    },
    {
      name: "write",
      description: "Write a UTF-8 text file relative to the workdir, creating parent directories as needed.",
      input_schema: {
        type: "object",
        properties: { file_path: { type: "string" }, content: { type: "string" } },
        required: ["file_path", "content"],
      },
      changes: true,
      run: (input) => {
        const path = text("write", input, "file_path");
        const content = optionalText("write", input, "content");
        const absolute = placeToChange("write", path);
        told("write", path, () => files.write(absolute, new TextEncoder().encode(content)));
        return `wrote ${byteLength(content)} bytes to ${path}`;
      },
    },
    {
      name: "edit",
      description: "Replace old_string with new_string in a file. old_string must be unique unless replace_all.",
      input_schema: {
        type: "object",
        properties: {
          file_path: { type: "string" },
          old_string: { type: "string" },
          new_string: { type: "string" },
          replace_all: { type: "boolean" },
        },
        required: ["file_path", "old_string", "new_string"],
      },
      changes: true,
      run: (input) => {
        const path = text("edit", input, "file_path");
        const old = text("edit", input, "old_string");
        const replacement = optionalText("edit", input, "new_string");
        const absolute = placeToChange("edit", path);
        const content = told("edit", path, () => {
          const stat = files.stat(absolute);
          if (stat !== undefined && !stat.isFile) throw new ToolError(`edit: ${path} is not a regular file`);
          if (stat !== undefined && stat.size > READ_LIMIT) {
            throw new ToolError(
              `edit: ${path} is ${stat.size} bytes, exceeds ${READ_LIMIT}-byte limit. ` +
                "The edit tool loads the whole file and cannot modify a file this large.",
            );
          }
          return strictlyDecoded(files.read(absolute), path);
        });
        const parts = content.split(old);
        const count = parts.length - 1;
        if (count === 0) throw new ToolError(`edit: old_string not found in ${path}`);
        if (count > 1 && !input["replace_all"]) {
          throw new ToolError(`edit: old_string appears ${count} times in ${path} (must be unique)`);
        }
        told("edit: write", path, () => files.write(absolute, new TextEncoder().encode(parts.join(replacement))));
        return `edited ${path} (${count} replacement(s))`;
      },
    },
    {
      name: "glob",
      description: "Match files under the workdir against a glob pattern. Results are mtime-sorted, newest first.",
      input_schema: {
        type: "object",
        properties: {
          pattern: { type: "string" },
          path: { type: "string", description: "Directory to search in. Defaults to the workdir." },
        },
        required: ["pattern"],
      },
      changes: false,
      run: (input) => {
        const pattern = text("glob", input, "pattern");
        const path = optionalText("glob", input, "path");
        if (pattern.startsWith("/")) {
          throw new ToolError("glob: absolute pattern not permitted; pass a relative pattern (and optionally path)");
        }
        if (pattern.split(/[\\/{},]/).includes("..")) throw new ToolError('glob: ".." is not permitted in the pattern');
        const root = path === "" ? WORKDIR : place(path);
        const found = [];
        try {
          const matches = globMatcher(pattern);
          for (const file of files.files(root)) {
            const relative = file.path.slice(root.length + 1);
            if (relative !== "" && !isNoise(relative) && matches(relative)) found.push(file);
          }
        } catch (error) {
          if (error instanceof BadPattern) throw new ToolError(`glob: ${error.message}`);
          throw error;
        }
        if (found.length === 0) return "no matches";
        found.sort((one, other) => other.mtime - one.mtime);
        return found
          .slice(0, GLOB_RESULTS)
          .map((file) => file.path)
          .join("\n");
      },
    },
    {
      name: "grep",
      description: "Search file contents for a regex. Uses ripgrep if available, otherwise a built-in walker.",
      input_schema: {
        type: "object",
        properties: { pattern: { type: "string" }, path: { type: "string" } },
        required: ["pattern"],
      },
      changes: false,
      run: async (input, signal) => {
        const pattern = text("grep", input, "pattern");
        const path = optionalText("grep", input, "path");
        try {
          return await grep(files, pattern, path === "" ? WORKDIR : place(path), signal);
        } catch (error) {
          if (error instanceof BadRegex) throw new ToolError(`grep: invalid regex: ${error.message}`);
          throw error;
        }
      },
    },
  ];
}

/** What `work` gives, or the file system's refusal in the toolset's words. */
function told<T>(tool: string, path: string, work: () => T): T {
  try {
    return work();
  } catch (error) {
    if (error instanceof FileError) throw new ToolError(`${tool}: ${path}: ${error.message}`);
    throw error;
  }
}

/** The input is the model's: nothing has checked its shape. */
function text(tool: string, input: Input, name: string): string {
  const value = optionalText(tool, input, name);
  if (value === "") throw new ToolError(`${tool}: ${name} is required`);
  return value;
}

function optionalText(tool: string, input: Input, name: string): string {
  const value = input[name] ?? "";
  if (typeof value !== "string") throw new ToolError(`${tool}: ${name} must be a string`);
  return value;
}

function rangeOf(value: unknown): [number, number] | undefined {
  if (value === undefined || value === null || (Array.isArray(value) && value.length === 0)) return undefined;
  if (Array.isArray(value) && value.length === 2 && value.every((each) => Number.isInteger(each))) {
    return [Number(value[0]), Number(value[1])];
  }
  throw new ToolError("read: view_range must be [start_line, end_line]");
}

function decoded(bytes: Uint8Array): string {
  return new TextDecoder("utf-8", { fatal: false, ignoreBOM: true }).decode(bytes);
}

/** An edit writes back what it read: bytes that are no text would be lost. */
function strictlyDecoded(bytes: Uint8Array, path: string): string {
  try {
    return new TextDecoder("utf-8", { ignoreBOM: true, fatal: true }).decode(bytes);
  } catch {
    throw new ToolError(`edit: ${path} is not a UTF-8 text file`);
  }
}

/** Lines of a file that is too large to be read whole. The selected part is held in memory, no more. */
function largeRange(files: Files, absolute: string, path: string, [startLine, endLine]: [number, number]): string {
  const start = Math.max(0, startLine - 1);
  const end = endLine > 0 ? endLine : Number.POSITIVE_INFINITY;
  const parts: Uint8Array[] = [];
  let size = 0;
  let line = 0;
  if (end <= start) return "";
  const collect = (bytes: Uint8Array): void => {
    parts.push(bytes);
    size += bytes.byteLength;
    if (size <= READ_LIMIT) return;
    if (end - start === 1) {
      throw new ToolError(
        `read: line ${start + 1} of ${path} alone exceeds ${READ_LIMIT}-byte limit. ` +
          "The read tool cannot return part of a line, so view_range cannot narrow this further.",
      );
    }
    throw new ToolError(
      `read: view_range [${startLine}, ${endLine}] of ${path} exceeds ${READ_LIMIT}-byte limit. ` +
        "Narrow the view_range to read a smaller portion.",
    );
  };
  for (const chunk of files.chunks(absolute)) {
    for (let at = 0; at < chunk.byteLength && line < end; ) {
      const newline = chunk.indexOf(10, at);
      const isEnded = newline >= 0;
      const next = isEnded ? newline + 1 : chunk.byteLength;
      // The newline belongs to the selection between two of its lines, not after its last.
      if (line >= start) collect(chunk.subarray(at, isEnded && line + 1 >= end ? newline : next));
      if (isEnded) line += 1;
      at = next;
    }
  }
  const selected = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    selected.set(part, at);
    at += part.byteLength;
  }
  return decoded(selected);
}
