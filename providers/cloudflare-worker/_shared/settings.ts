/**
 * Settings: declared as data in settings.json, read from the bindings in one go, every problem reported at once.
 *
 * The tables in the READMEs are made from the same file (`make sync`), which is why it is one. A provider's own settings
 * are a second file of that shape in its folder, read with the same `load`.
 */

import { SettingsError } from "./errors.ts";
import { log } from "./log.ts";
import { hide } from "./secrets.ts";
import declared from "./settings.json";

/** One setting, as settings.json declares it. Without a default it is required; an empty default means "unset". */
export interface Declaration {
  name: string;
  kind: string;
  help: string;
  default?: string;
  secret?: boolean;
  old_name?: string;
}

/** Where settings come from: the bindings of a Worker, a test's object. */
export type Environ = Readonly<Record<string, unknown>>;

const TRUE = new Set(["1", "true", "yes", "on"]);
const FALSE = new Set(["0", "false", "no", "off"]);

/** What is wrong with a value, by the kind of its setting; values are never quoted. */
const PROBLEMS: Record<string, (value: string) => string | undefined> = {
  text: () => undefined,
  // An HTTP library would quote another in its error.
  credential: (value) => (/^[!-~]+$/.test(value) ? undefined : "expected one word of ASCII: copy it again"),
  flag: (value) =>
    TRUE.has(value.toLowerCase()) || FALSE.has(value.toLowerCase()) ? undefined : "expected true or false",
  count: (value) => (/^\d+$/.test(value) && Number(value) >= 1 ? undefined : "expected 1 or more"),
  seconds: (value) => (Number(value) >= 0 && Number(value) < Infinity ? undefined : "expected 0 or more seconds"),
  names: (value) =>
    splitNames(value).every((name) => /^[\w.-]{1,128}$/.test(name))
      ? undefined
      : "expected names with commas between them",
  hosts: (value) => {
    const names = splitNames(value);
    const areHosts = names.every((name) => /^(?:\*|(?:\*\.)?[a-z0-9-]+(?:\.[a-z0-9-]+)*)$/i.test(name));
    return areHosts && names.length > 0
      ? undefined
      : "expected host names such as example.com or *.example.com with commas between them, or *";
  },
  url: (value) => (isUrl(value) ? undefined : "expected a URL that starts with https:// or http://"),
};

function splitNames(value: string): string[] {
  return value
    .split(",")
    .map((name) => name.trim())
    .filter((name) => name !== "");
}

function isUrl(value: string): boolean {
  const url = URL.parse(value);
  return url !== null && ["http:", "https:"].includes(url.protocol) && url.hostname !== "" && url.port !== "0";
}

/** Settings that were read, by name. */
export class Values {
  readonly #values: ReadonlyMap<string, string>;

  constructor(values: ReadonlyMap<string, string>) {
    this.#values = values;
  }

  text(name: string): string {
    return this.#values.get(name) ?? "";
  }

  number(name: string): number {
    return Number(this.text(name));
  }

  names(name: string): readonly string[] {
    return splitNames(this.text(name));
  }

  flag(name: string): boolean {
    return TRUE.has(this.text(name).toLowerCase());
  }
}

/**
 * Reads what `declarations` name from `environ`. An empty value counts as unset; what is read as a secret no log line shows.
 * Throws `SettingsError` naming every missing and every unusable setting beside the problems the caller has found.
 */
export function load(declarations: readonly Declaration[], environ: Environ, known: readonly string[] = []): Values {
  const values = new Map<string, string>();
  const problems = [...known];
  for (const setting of declarations) {
    const value = raw(setting, environ) ?? setting.default;
    if (value === undefined) {
      problems.push(`${setting.name} is not set: ${setting.help}`);
      continue;
    }
    if (setting.secret) hide(value);
    const problem = value === "" ? undefined : PROBLEMS[setting.kind]?.(value);
    if (problem !== undefined) problems.push(`${setting.name} is unusable: ${problem}`);
    values.set(setting.name, value);
  }
  if (problems.length > 0) throw new SettingsError(problems.join("; "));
  return new Values(values);
}

function raw(setting: Declaration, environ: Environ): string | undefined {
  const value = text(environ[setting.name]);
  if (value !== undefined || setting.old_name === undefined) return value;
  const old = text(environ[setting.old_name]);
  if (old !== undefined)
    log.warning("settings", { reason: `${setting.old_name} is the old name: set ${setting.name} instead` });
  return old;
}

function text(value: unknown): string | undefined {
  return typeof value === "string" && value.trim() !== "" ? value.trim() : undefined;
}

/** What every host needs. Durations are seconds. */
export interface Settings {
  readonly environmentId: string;
  readonly environmentKey: string;
  readonly baseUrl: string;
  /** The accepted signing keys, the current one first. */
  readonly webhookKeys: readonly string[];
  readonly allowEnvironmentKeyInSandbox: boolean;
  readonly maxLive: number;
  readonly launchConcurrency: number;
  readonly maxIdleSeconds: number;
  readonly maxWaitSeconds: number;
  readonly retentionSeconds: number;
  readonly stageFiles: boolean;
}

/**
 * Reads the settings, and refuses an organisation API key on the host: nothing here needs one, and a leak of it would
 * cost more than this host is worth. Throws `SettingsError`.
 */
export function readSettings(environ: Environ): Settings {
  const problems =
    text(environ["ANTHROPIC_API_KEY"]) === undefined
      ? []
      : ["ANTHROPIC_API_KEY is set: remove it, a sandbox host works with the environment key only"];
  const values = load(declared, environ, problems);
  return {
    environmentId: values.text("ANTHROPIC_ENVIRONMENT_ID"),
    environmentKey: values.text("ANTHROPIC_ENVIRONMENT_KEY"),
    baseUrl: values.text("ANTHROPIC_BASE_URL").replace(/\/+$/, ""),
    webhookKeys: ["ANTHROPIC_WEBHOOK_SIGNING_KEY", "ANTHROPIC_WEBHOOK_SIGNING_KEY_NEXT"]
      .map((name) => values.text(name))
      .filter((key) => key !== ""),
    allowEnvironmentKeyInSandbox: values.flag("ALLOW_ENVIRONMENT_KEY_IN_SANDBOX"),
    maxLive: values.number("SANDBOX_MAX_LIVE"),
    launchConcurrency: values.number("SANDBOX_LAUNCH_CONCURRENCY"),
    maxIdleSeconds: values.number("SANDBOX_MAX_IDLE_SECONDS"),
    maxWaitSeconds: values.number("SANDBOX_MAX_WAIT_SECONDS"),
    retentionSeconds: values.number("SANDBOX_RETENTION_SECONDS"),
    stageFiles: values.flag("SANDBOX_STAGE_FILES"),
  };
}
