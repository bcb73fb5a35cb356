/**
 * Items that no runner holds and that the server does not let go: healing ends them, behind a fence (R9, P10).
 *
 * Usually a lease that nobody extends lapses by itself within six minutes. Some servers never let an item lapse that was
 * acked and never claimed, and one whose sweeper is down lets none. Such a session would wait for ever with a live item.
 *
 * The fence is a heartbeat on a condition that holds only while nobody else beats: that there was none yet, or that the
 * last one is the very one that is long gone. A runner that is alive after all makes it fail, and one that comes back later
 * finds that it has lost its lease, before it runs or stops anything.
 */

import type Anthropic from "@anthropic-ai/sdk";
import type { BetaSelfHostedWork } from "@anthropic-ai/sdk/resources/beta/environments/work";
import { apiError, isStatus } from "./api.ts";
import { leaseState, NO_HEARTBEAT } from "./lease.ts";
import { log } from "./log.ts";

const STARTING_SECONDS = 150; // an acked item is claimed within milliseconds; this is longer than any launch may take
const SILENT_SECONDS = 600; // a lease lapses 300 to 360 s after its last beat; what lives this long does not lapse

/** How many seconds ago something was, by the server's clock; 0 for what never happened. */
export type Age = (moment: string | null | undefined) => number;

const CANNOT_MATCH = "2000-01-01T00:00:00.000000Z"; // no live item has this heartbeat

/** Stops such items. It remembers nothing. */
export class Freeing {
  readonly #client: Anthropic;
  readonly #environmentId: string;

  constructor(client: Anthropic, environmentId: string) {
    this.#client = client;
    this.#environmentId = environmentId;
  }

  /** Whether nobody can hold the item any more. */
  isDue(item: BetaSelfHostedWork, age: Age): boolean {
    if (item.state === "starting" && !item.latest_heartbeat_at) return age(item.acknowledged_at) > STARTING_SECONDS;
    if (item.state === "stopping") return age(item.stop_requested_at) > SILENT_SECONDS;
    return ["starting", "active"].includes(item.state) && age(item.latest_heartbeat_at) > SILENT_SECONDS;
  }

  /** Stops the item unless somebody holds it. Throws the SDK's errors. */
  async free(item: BetaSelfHostedWork): Promise<boolean> {
    if (!(await (item.state === "stopping" ? this.#isStopping(item) : this.#isOurs(item)))) return false;
    // Sent once: when its answer is lost, the item may be queued again before a second one arrives.
    const stop = { environment_id: this.#environmentId, force: true };
    await this.#client.beta.environments.work.stop(item.id, stop, { maxRetries: 0 });
    const reason = `${item.state} and held by nobody: stopped, so that it can be queued again`;
    log.warning("healed", { session: item.data.id, work: item.id, reason });
    return true;
  }

  /**
   * Who asked for that stop asked for this one too, unless another host has completed it, and the session is queued
   * again. A beat changes nothing about an item that is stopping, and this one nothing about any other.
   */
  async #isStopping(item: BetaSelfHostedWork): Promise<boolean> {
    const condition = { environment_id: this.#environmentId, expected_last_heartbeat: CANNOT_MATCH };
    try {
      const beat = await this.#client.beta.environments.work.heartbeat(item.id, condition, { maxRetries: 0 });
      return beat.state === "stopping";
    } catch (error) {
      if ([404, 409, 412].some((status) => isStatus(error, status))) return false;
      throw error;
    }
  }

  /** Takes the lease, if its last heartbeat is still the one that was listed. */
  async #isOurs(item: BetaSelfHostedWork): Promise<boolean> {
    const listed = item.latest_heartbeat_at;
    let current = await this.#beat(item, listed || NO_HEARTBEAT);
    if (current && listed && Date.parse(current) === Date.parse(listed)) {
      current = await this.#beat(item, current); // the same one, as the server writes it here
    }
    return current === undefined;
  }

  /** Undefined when the beat was recorded, and the lease is ours; else the server's own last heartbeat, or nothing. */
  async #beat(item: BetaSelfHostedWork, expected: string): Promise<string | undefined> {
    const condition = { environment_id: this.#environmentId, expected_last_heartbeat: expected };
    try {
      const beat = await this.#client.beta.environments.work.heartbeat(item.id, condition, { maxRetries: 0 });
      return beat.lease_extended ? undefined : "";
    } catch (error) {
      if (isStatus(error, 412)) return leaseState(apiError(error)).lastHeartbeat ?? "";
      throw error;
    }
  }
}
