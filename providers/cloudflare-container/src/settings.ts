/** The shared settings and this folder's own. */

import { type Declaration, type Environ, load, readSettings, type Settings } from "../_shared/settings.ts";
import declared from "./settings.json";

const MIB = 1024 * 1024;

export interface FolderSettings extends Settings {
  /** Empty: none. */
  readonly tools: string;
  readonly toolNames: readonly string[];
  /** Beside the API's; with `*` among them, any. */
  readonly allowedHosts: readonly string[];
  readonly keepWarmSeconds: number;
  readonly maxFilesBytes: number;
}

/** Throws `SettingsError`. */
export function readAll(env: Env): FolderSettings {
  const environ: Environ = { ...env };
  const shared = readSettings(environ);
  const own = load(declared as Declaration[], environ);
  return {
    ...shared,
    tools: own.text("SANDBOX_TOOLS"),
    toolNames: own.names("SANDBOX_TOOL_NAMES"),
    allowedHosts: own.names("SANDBOX_ALLOWED_HOSTS"),
    keepWarmSeconds: own.number("SANDBOX_KEEP_WARM_SECONDS"),
    maxFilesBytes: own.number("FILES_MAX_MB") * MIB,
  };
}
