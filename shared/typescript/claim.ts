/**
 * R1 and R2: ack, then claim, before any tool exists.
 *
 * An ack is no claim and no fence: the first heartbeat is, with NO_HEARTBEAT, answered 200. It is sent once, without
 * retries, because a retried claim meets its own first attempt and reads it as another runner's.
 */

import { apiError, isStatus, statusOf } from "./api.ts";
import { NotOurs } from "./errors.ts";
import { type Lease, REFUSED } from "./lease.ts";

/** Three of the SDK's pauses and an answer: a runner that beats has by then, also if one beat got lost (SDK in Python). */
export const SETTLE_MS = 100_000;
const SETTLE_ATTEMPTS = 3;
const PAUSE_MS = 2_000;

/**
 * Returns once the lease is ours, or the server wants the item stopped (`lease.end`). `wasTried` when a runner before this
 * one, without memory now, may have claimed already. Throws `NotOurs`.
 */
export async function ackAndClaim(
  lease: Lease,
  wasTried: boolean,
  signal: AbortSignal,
  settleMs = SETTLE_MS,
): Promise<void> {
  if (!wasTried) {
    try {
      await lease.ack();
    } catch (error) {
      apiError(error);
      if (isStatus(error, ...REFUSED)) throw new NotOurs(`the ack was refused (${statusOf(error)})`);
      // A conflict, a server error or no answer decides nothing: the claim will tell.
    }
    if (await lease.beat()) return;
    if (lease.end === "lost") throw new NotOurs("the claim was refused");
    if (lease.end === "stopping") return;
  }
  await settleUnknownClaim(lease, signal, settleMs);
}

/**
 * The claim was sent and not answered (R2). If a heartbeat was recorded and then stands still for longer than any runner's
 * does, nobody else is beating: it is ours. If it moves, it is another runner's. If there is none, we claim again.
 */
async function settleUnknownClaim(lease: Lease, signal: AbortSignal, settleMs: number): Promise<void> {
  for (let attempt = 0; attempt < SETTLE_ATTEMPTS && !signal.aborted; attempt += 1) {
    const first = await lease.probe();
    if (first?.lastHeartbeat !== null) {
      await pause(settleMs, signal);
      if (signal.aborted) break;
      const again = await lease.probe();
      if (first === undefined || again === undefined) continue;
      if (again.state !== first.state || again.lastHeartbeat !== first.lastHeartbeat) {
        throw new NotOurs("the claim was not answered, and another runner beats the item");
      }
      if (first.lastHeartbeat !== null) lease.adopt(first.lastHeartbeat);
    }
    if ((await lease.beat()) || lease.end === "stopping") return;
    if (lease.end === "lost") throw new NotOurs("the claim was not answered, and the item is not ours");
    await pause(Math.min(PAUSE_MS, settleMs), signal);
  }
  throw new NotOurs("the claim was not answered");
}

/** Waits so long, or until `signal` is aborted. */
async function pause(ms: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return;
  await new Promise<void>((resolve) => {
    const timer = setTimeout(resolve, ms);
    const wake = () => {
      clearTimeout(timer);
      resolve();
    };
    signal.addEventListener("abort", wake, { once: true });
  });
}
