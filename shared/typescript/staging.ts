/**
 * What the host brings into a sandbox before the runner starts (R12). Off unless SANDBOX_STAGE_FILES says so.
 *
 * - The agent's skills, where the server does not let the session's own token read them. The host fetches them with the
 *   environment key and puts them where the SDK would have: `skills/<name>/`.
 * - The input files that the session's metadata names: `input:<name>` is the key, an https address the value. They are put
 *   into `inputs/`, before each runner anew: what the agent changes there does not stay.
 *
 * Nothing of this keeps a session from being served. What could not be brought is named in the log, and for the agent in
 * `inputs/ERRORS.txt`.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaManagedAgentsSession } from "@anthropic-ai/sdk/resources/beta/sessions/sessions";
import { apiError, errorLabel, isStatus, MAX_RETRIES, openClient } from "./api.ts";
import { BadArchive } from "./archive.ts";
import type { LaunchFiles } from "./dispatcher.ts";
import { FetchRefused } from "./errors.ts";
import { fetchPublic } from "./fetching.ts";
import type { Job } from "./jobs.ts";
import { log } from "./log.ts";
import { downloadSkill, resolveSkill } from "./skills.ts";

const STAGE_MS = 45_000; // for everything; half of what a launch has
const MAX_INPUT_BYTES = 10 * 1024 * 1024; // one file
const MAX_BYTES = 20 * 1024 * 1024; // all files of a session, and of its skills: they travel in one call, of at most 32 MiB
const PREFIX = "input:";
const NAME = /^\w[\w.\- ]{0,100}(?:\/\w[\w.\- ]{0,100}){0,4}$/;
const ERRORS = "inputs/ERRORS.txt";

type Files = Map<string, Uint8Array>;

/** Path relative to the working directory -> content. Never throws for what cannot be had. `client` has the environment key. */
export async function stage(job: Job, client: Anthropic, fetchFile = fetchPublic, ms = STAGE_MS): Promise<LaunchFiles> {
  let timer: ReturnType<typeof setTimeout> | null = null;
  const late = new Promise<"late">((resolve) => {
    timer = setTimeout(() => resolve("late"), ms);
  });
  try {
    const brought = await Promise.race([bring(job, client, fetchFile), late]);
    if (brought !== "late") return brought;
    log.warning("stage", { session: job.sessionId, reason: `not done within ${ms / 1000} s: no files were brought` });
  } catch (error) {
    const reason = "no files were brought";
    log.warning("stage", { session: job.sessionId, error: errorLabel(apiError(error)), reason });
  } finally {
    clearTimeout(timer);
  }
  return new Map();
}

async function bring(job: Job, client: Anthropic, fetchFile: typeof fetchPublic): Promise<Files> {
  const session = await client.beta.sessions.retrieve(job.sessionId);
  const skills = await skillsOf(job, session, client);
  const taken = [...skills.values()].reduce((sum, content) => sum + content.byteLength, 0);
  const inputs = await inputsOf(job, session, fetchFile, MAX_BYTES - taken);
  if (skills.size + inputs.size > 0) {
    const reason = `${skills.size} files of skills, ${inputs.size} of inputs`;
    log.info("stage", { session: job.sessionId, reason });
  }
  return new Map([...skills, ...inputs]);
}

async function skillsOf(job: Job, session: BetaManagedAgentsSession, client: Anthropic): Promise<Files> {
  const found: Files = new Map();
  if (session.agent.skills.length === 0 || !(await areRefused(job, session))) return found;
  let size = 0;
  for (const skill of session.agent.skills) {
    try {
      const version = await resolveSkill(skill, client);
      for (const [path, content] of await downloadSkill(version, client)) {
        found.set(`${version.directory}/${path}`, content);
        size += content.byteLength;
      }
    } catch (error) {
      const isOurs = error instanceof BadArchive;
      const reason = `skill ${skill.skill_id} is left out${isOurs ? `: ${error.message}` : ""}`;
      log.warning("stage", { session: job.sessionId, error: isOurs ? error : errorLabel(apiError(error)), reason });
    }
    if (size > MAX_BYTES) {
      const reason = `the skills have more than ${MAX_BYTES} bytes: not brought`;
      log.warning("stage", { session: job.sessionId, reason });
      return new Map();
    }
  }
  return found;
}

/** Whether the runner, with its own token, would be. */
async function areRefused(job: Job, session: BetaManagedAgentsSession): Promise<boolean> {
  const [skill] = session.agent.skills;
  if (!job.isItemToken || skill === undefined) return false; // it has the environment key
  const runners = openClient(job.token, job.baseUrl, { maxRetries: MAX_RETRIES, timeout: STAGE_MS });
  try {
    await resolveSkill(skill, runners);
  } catch (error) {
    apiError(error);
    if (!isStatus(error, 401, 403, 404)) throw error;
    return !isStatus(error, 404);
  }
  return false;
}

async function inputsOf(
  job: Job,
  session: BetaManagedAgentsSession,
  fetchFile: typeof fetchPublic,
  room: number,
): Promise<Files> {
  const found: Files = new Map();
  const problems: string[] = [];
  let left = room;
  for (const [key, url] of Object.entries(session.metadata).sort()) {
    if (!key.startsWith(PREFIX)) continue;
    const name = key.slice(PREFIX.length);
    try {
      if (!NAME.test(name)) throw new FetchRefused("its name is no relative path of plain names");
      const content = await fetchFile(url, Math.min(left, MAX_INPUT_BYTES));
      found.set(`inputs/${name}`, content);
      left -= content.byteLength;
    } catch (error) {
      if (!(error instanceof FetchRefused)) throw error;
      problems.push(`${name}: ${error.message}\n`);
      log.warning("stage", { session: job.sessionId, reason: `input ${name}: ${error.message}` });
    }
  }
  if (problems.length > 0) found.set(ERRORS, new TextEncoder().encode(problems.join("")));
  return found;
}
