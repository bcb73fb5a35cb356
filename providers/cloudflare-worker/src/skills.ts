/** The agent's skills, in `skills/<name>/` of the workdir, as the SDK's worker puts them. A skill that fails is skipped. */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaManagedAgentsSession } from "@anthropic-ai/sdk/resources/beta/sessions/sessions";
import { apiError, errorLabel } from "../_shared/api.ts";
import { log } from "../_shared/log.ts";
import { BadArchive, MAX_ARCHIVE_BYTES, unpack } from "./archive.ts";
import { FileError, type Files, WORKDIR } from "./files.ts";

const DIRECTORY = `${WORKDIR}/skills`;

/** What is installed, so that a version is fetched once and not with every run. */
export interface InstalledSkills {
  versionOf(directory: string): string | undefined;
  note(directory: string, version: string): void;
  /** All of `work`, or, when it throws, nothing of it. */
  atomically<T>(work: () => T): T;
}

export async function installSkills(
  session: BetaManagedAgentsSession,
  api: Anthropic,
  files: Files,
  installed: InstalledSkills,
): Promise<void> {
  for (const skill of session.agent.skills) {
    try {
      await install(skill, api, files, installed);
    } catch (error) {
      const isOurs = error instanceof BadArchive || error instanceof FileError;
      const reason = `skill ${skill.skill_id} is left out${isOurs ? `: ${error.message}` : ""}`;
      log.warning("skill", { session: session.id, error: isOurs ? error : errorLabel(apiError(error)), reason });
    }
  }
}

async function install(
  skill: BetaManagedAgentsSession["agent"]["skills"][number],
  api: Anthropic,
  files: Files,
  installed: InstalledSkills,
): Promise<void> {
  const { versions } = api.beta.skills;
  const version = await versions.retrieve(skill.version, { skill_id: skill.skill_id });
  const directory = `${DIRECTORY}/${directoryName(version.name, skill.skill_id)}`;
  if (installed.versionOf(directory) === version.id) return;
  // The version may be the alias `latest`, which only the retrieval resolves.
  const response = await versions.download(version.id, { skill_id: skill.skill_id });
  if (Number(response.headers.get("content-length") ?? 0) > MAX_ARCHIVE_BYTES) throw new BadArchive("it is too large");
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (bytes.byteLength > MAX_ARCHIVE_BYTES) throw new BadArchive("it is too large");
  const entries = await unpack(bytes);
  installed.atomically(() => {
    files.remove(directory);
    files.makeDirectory(directory);
    for (const [path, data] of entries) files.write(`${directory}/${path}`, data);
    installed.note(directory, version.id);
  });
}

/** The skill's name as one safe path component. */
function directoryName(name: string, skillId: string): string {
  const last = name.trim().split("/").pop() ?? "";
  return last === "" || last === "." || last === ".." ? skillId : last;
}
