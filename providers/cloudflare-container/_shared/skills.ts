/** The agent's skills, as the SDK's worker fetches them: into `skills/<name>/` of the working directory. */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaManagedAgentsSession } from "@anthropic-ai/sdk/resources/beta/sessions/sessions";
import { BadArchive, MAX_ARCHIVE_BYTES, unpack } from "./archive.ts";

export type Skill = BetaManagedAgentsSession["agent"]["skills"][number];

/** One version of a skill, and where it belongs, relative to the working directory. */
export interface SkillVersion {
  readonly id: string;
  readonly skillId: string;
  readonly directory: string;
}

/** Throws the SDK's errors. The version may be the alias `latest`, which only this resolves. */
export async function resolveSkill(skill: Skill, api: Anthropic): Promise<SkillVersion> {
  const version = await api.beta.skills.versions.retrieve(skill.version, { skill_id: skill.skill_id });
  return {
    id: version.id,
    skillId: skill.skill_id,
    directory: `skills/${directoryName(version.name, skill.skill_id)}`,
  };
}

/** Its files, by path below its directory. Throws `BadArchive` and the SDK's errors. */
export async function downloadSkill(version: SkillVersion, api: Anthropic): Promise<Map<string, Uint8Array>> {
  const response = await api.beta.skills.versions.download(version.id, { skill_id: version.skillId });
  if (Number(response.headers.get("content-length") ?? 0) > MAX_ARCHIVE_BYTES) throw new BadArchive("it is too large");
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (bytes.byteLength > MAX_ARCHIVE_BYTES) throw new BadArchive("it is too large");
  return unpack(bytes);
}

/** The skill's name as one safe path component. */
function directoryName(name: string, skillId: string): string {
  const last = name.trim().split("/").pop() ?? "";
  return last === "" || last === "." || last === ".." ? skillId : last;
}
