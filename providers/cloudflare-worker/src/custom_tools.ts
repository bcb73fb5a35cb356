/**
 * Your own tools: the agent's custom tools that this deployment answers. Add them here, in the SDK's shape (`betaTool` of
 * `@anthropic-ai/sdk/helpers/beta/json-schema` makes one). A call that was running when the object was evicted is answered
 * with an error that says so, and not run again.
 */

import type { BetaRunnableTool } from "@anthropic-ai/sdk/lib/tools/BetaRunnableTool";
import type { Files } from "./files.ts";

export function customTools(_files: Files): BetaRunnableTool[] {
  return [];
}
