/** The agent's skills, in `skills/<name>/` of the workdir, as the SDK's worker puts them. A skill that fails is skipped. */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaManagedAgentsSession } from "@anthropic-ai/sdk/resources/beta/sessions/sessions";
import { apiError, errorLabel, isStatus } from "../_shared/api.ts";
import { BadArchive } from "../_shared/archive.ts";
import { log } from "../_shared/log.ts";
import { downloadSkill, resolveSkill, type Skill } from "../_shared/skills.ts";
import { FileError, type Files, WORKDIR } from "./files.ts";

/** What is installed, so that a version is fetched once and not with every run. */
export interface InstalledSkills {
  versionOf(directory: string): string | undefined;
  note(directory: string, version: string): void;
  /** All of `work`, or, when it throws, nothing of it. */
  atomically<T>(work: () => T): T;
}

/** `areBrought`: the dispatcher has put those there that the session's token may not read. */
export async function installSkills(
  session: BetaManagedAgentsSession,
  api: Anthropic,
  files: Files,
  installed: InstalledSkills,
  areBrought: boolean,
): Promise<void> {
  for (const skill of session.agent.skills) {
    try {
      await install(skill, api, files, installed);
    } catch (error) {
      if (areBrought && isStatus(error, 401, 403)) continue;
      const isOurs = error instanceof BadArchive || error instanceof FileError;
      const reason = `skill ${skill.skill_id} is left out${isOurs ? `: ${error.message}` : ""}`;
      log.warning("skill", { session: session.id, error: isOurs ? error : errorLabel(apiError(error)), reason });
    }
  }
}

async function install(skill: Skill, api: Anthropic, files: Files, installed: InstalledSkills): Promise<void> {
  const version = await resolveSkill(skill, api);
  const directory = `${WORKDIR}/${version.directory}`;
  if (installed.versionOf(directory) === version.id) return;
  const entries = await downloadSkill(version, api);
  installed.atomically(() => {
    files.remove(directory);
    files.makeDirectory(directory);
    for (const [path, data] of entries) files.write(`${directory}/${path}`, data);
    installed.note(directory, version.id);
  });
}
