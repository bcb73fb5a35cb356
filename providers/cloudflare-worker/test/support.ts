/** A session's object with its files, and its tools called as the SDK calls them. */

import { env, runInDurableObject } from "cloudflare:test";
import { ToolError } from "@anthropic-ai/sdk/lib/tools/ToolError";
import { Files } from "../src/files.ts";
import type { SessionObject } from "../src/session_object.ts";
import { agentTools, type Mount } from "../src/tools.ts";

export const MIB = 1024 * 1024;
let count = 0;

declare global {
  namespace Cloudflare {
    interface Env {
      EMULATOR_URL: string;
    }
  }
}

export interface Sandbox {
  readonly files: Files;
  readonly storage: DurableObjectStorage;
  /** What the tool answers; `Error: ...` when it fails. */
  call(name: string, input: Record<string, unknown>): Promise<string>;
}

/** Runs `work` in a new object. */
export function inSandbox(
  work: (sandbox: Sandbox) => Promise<void> | void,
  options: { maxBytes?: number; mounts?: readonly Mount[] } = {},
): Promise<void> {
  count += 1;
  const stub: DurableObjectStub<SessionObject> = env.SESSIONS.getByName(`test-${count}`);
  return runInDurableObject(stub, async (_, state) => {
    const files = new Files(state.storage.sql, options.maxBytes ?? 64 * MIB);
    files.create();
    const tools = agentTools(files, () => options.mounts ?? []);
    const call = async (name: string, input: Record<string, unknown>): Promise<string> => {
      const tool = tools.find((each) => each.name === name);
      try {
        return (await tool?.run(input, new AbortController().signal)) ?? "";
      } catch (error) {
        if (error instanceof ToolError) return `Error: ${error.message}`;
        throw error;
      }
    };
    await work({ files, storage: state.storage, call });
  });
}

export function bytes(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}
