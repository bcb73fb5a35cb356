// The folder's toolset beside the SDK's own: the same calls on the same files. Prints what differs, one JSON object a line.
//
// node --experimental-strip-types official_toolset.mts, in a directory that has the folder's src/ and node_modules/.

import { mkdtempSync, realpathSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { DatabaseSync } from "node:sqlite";

const here = (path: string) => import(pathToFileURL(join(process.cwd(), path)).href);
const { betaAgentToolset20260401 } = await here("node_modules/@anthropic-ai/sdk/tools/agent-toolset/node.mjs");
const { ToolError } = await here("node_modules/@anthropic-ai/sdk/lib/tools/ToolError.mjs");
const { Files } = await here("src/files.ts");
const { agentTools } = await here("src/tools.ts");

/** As much of a Durable Object's SQL as the files use, over SQLite itself. */
class Sql {
  #database = new DatabaseSync(":memory:");
  databaseSize = 0;
  exec(query: string, ...values: (string | number | ArrayBuffer)[]) {
    const given = values.map((value) => (value instanceof ArrayBuffer ? new Uint8Array(value) : value));
    const rows = this.#database.prepare(query).all(...given);
    return { toArray: () => rows, one: () => rows[0], [Symbol.iterator]: () => rows[Symbol.iterator]() };
  }
}

const workdir = realpathSync(mkdtempSync(join(tmpdir(), "toolset-")));
const files = new Files(new Sql(), 2 ** 30);
files.create();
const official = new Map(betaAgentToolset20260401({ workdir }).map((tool) => [tool.name, tool]));
const ours = new Map(agentTools(files, () => []).map((tool) => [tool.name, tool]));

async function outcome(tool: { run: Function }, input: unknown): Promise<string> {
  try {
    return String(await tool.run(input, new AbortController().signal));
  } catch (error) {
    return `Error: ${error instanceof ToolError ? error.content : String(error)}`;
  }
}

function differs(what: string, theirs: unknown, mine: unknown): void {
  if (JSON.stringify(theirs) !== JSON.stringify(mine)) console.log(JSON.stringify({ what, official: theirs, ours: mine }));
}

/** Searches promise no order among files of one age, and the official one knows its directory by another name. */
function settled(name: string, text: string): string {
  const renamed = text.replaceAll(workdir, "/workspace");
  return name === "glob" || name === "grep" ? renamed.split("\n").sort().join("\n") : renamed;
}

differs("names", [...official.keys()], [...ours.keys()]);
for (const [name, tool] of official) {
  differs(`schema of ${name}`, tool.input_schema, ours.get(name).input_schema);
  if (name !== "bash") differs(`description of ${name}`, tool.description, ours.get(name).description);
}

let given = "";
for await (const chunk of process.stdin.setEncoding("utf8")) given += chunk;
const calls: [string, Record<string, unknown>][] = JSON.parse(given);
for (const [name, input] of calls) {
  const [theirs, mine] = [await outcome(official.get(name), input), await outcome(ours.get(name), input)];
  differs(`${name} ${JSON.stringify(input).slice(0, 200)}`, settled(name, theirs), settled(name, mine));
}
console.log(JSON.stringify({ calls: calls.length }));
