/** What a session's object is told, what it answers, and what it remembers. */

import type { LaunchFiles } from "../_shared/dispatcher.ts";
import type { EgressRules } from "./egress.ts";

/** What a start needs to know of the settings. */
export interface Options {
  readonly keepWarmSeconds: number;
  readonly maxFilesBytes: number;
  readonly retentionSeconds: number;
  /** Of a container that is started now. */
  readonly egress: EgressRules | undefined;
}

/** What a start is asked to do. */
export interface Launch {
  readonly sessionId: string;
  readonly stdin: string;
  readonly files: LaunchFiles;
  readonly options: Options;
}

/** How a start ended. Errors lose their class on the way between objects. */
export interface Started {
  readonly outcome: "ready" | "served_already" | "failed";
  /** Of a failure. */
  readonly reason: string;
  readonly retriable: boolean;
}

/** What an object must know after it has lost its memory. */
export interface Session {
  readonly id: string;
  options: Options;
  /** "awake": it has a container, or has lost one that it does not know of yet. */
  phase: "asleep" | "awake";
  /** Of the container there is. */
  key: string;
  /** What that one is held to. */
  egress: EgressRules | undefined;
  /** Since when it is in this phase, and, awake, without a runner; in milliseconds. */
  idleSince: number | undefined;
  /** The last hand-out came to nothing, or is being started: the container waits for the next one, however short it is kept warm. */
  held: boolean;
  /** A runner was started since the last save. */
  unsaved: boolean;
  failedSaves: number;
  /** Why files of the container there is will be missed in the next one; empty: they will not. */
  lost: string;
  /** The same of the container before, until its agent was told. */
  news: string;
  silentSince: number | undefined;
}

/** Of a session that nobody has spoken to yet. */
export function newSession(id: string): Session {
  const options = { keepWarmSeconds: 0, maxFilesBytes: 0, retentionSeconds: 0, egress: undefined };
  const nothing = {
    idleSince: undefined,
    silentSince: undefined,
    held: false,
    unsaved: false,
    failedSaves: 0,
    lost: "",
    news: "",
  };
  return { id, options, phase: "asleep", key: "", egress: undefined, ...nothing };
}
