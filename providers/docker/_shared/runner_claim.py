"""R1 and R2: ack, then claim, by ourselves, before the SDK's worker and its tools exist.

An ack is no claim and no fence: the first heartbeat is, with NO_HEARTBEAT, answered 200. It is sent once, without
retries, because a retried claim meets its own first attempt and reads it as another runner's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
from anthropic import AsyncAnthropic, Middleware
from anthropic.types.beta.environments import BetaSelfHostedWorkHeartbeatResponse

from .runner_job import RunnerJob
from .runner_lease import NO_HEARTBEAT, REFUSED, UNDECIDED, Lease, lease_state, note_beat
from .runner_lock import LeaseState
from .runner_pages import RefusePages

CALL_TIMEOUT_SECONDS = 10.0
BEAT_SECONDS = 30.0  # the SDK's longest pause between two heartbeats, and how long it waits for the answer to one
SETTLE_SECONDS = 3 * BEAT_SECONDS + CALL_TIMEOUT_SECONDS  # a runner that beats has by then, also if one beat got lost
_SETTLE_ATTEMPTS = 3
_PAUSE_SECONDS = 2.0
_CANNOT_MATCH = "2000-01-01T00:00:00.000000Z"  # no live item has this heartbeat


class NotOurs(Exception):
    """The item is another runner's, or not ours to serve. Nothing was run and nothing may be stopped."""


def open_api(job: RunnerJob, *middleware: Middleware, **options: Any) -> AsyncAnthropic:
    """A client with this item's token. Without retries by default: for calls whose outcome we decide ourselves."""
    options = {"max_retries": 0, "timeout": CALL_TIMEOUT_SECONDS, **options}
    chain = [*middleware, RefusePages()]
    return AsyncAnthropic(auth_token=job.token, base_url=job.base_url, middleware=chain, **options)


async def beat(api: AsyncAnthropic, job: RunnerJob, expected: str) -> BetaSelfHostedWorkHeartbeatResponse:
    """One heartbeat on the condition that the last recorded one is `expected`."""
    return await api.beta.environments.work.heartbeat(
        job.work_id, environment_id=job.environment_id, expected_last_heartbeat=expected
    )


async def probe(api: AsyncAnthropic, job: RunnerJob) -> LeaseState | None:
    """Asks for the item's lease without touching it, with a heartbeat whose condition cannot hold (R3).

    None when the control plane gave no usable answer.
    """
    try:
        answer = await beat(api, job, _CANNOT_MATCH)
    except anthropic.APIStatusError as error:
        if error.status_code == 412:
            return lease_state(error.body)
        # A queued item has no lease to compare with, and a server may say so this way instead.
        return LeaseState("queued", None) if error.status_code in (404, 409) else None
    except anthropic.APIError:
        return None
    return LeaseState(answer.state, answer.last_heartbeat or None)


async def ack_and_claim(
    api: AsyncAnthropic, job: RunnerJob, lease: Lease, *, settle_seconds: float = SETTLE_SECONDS
) -> None:
    """Returns once `lease` is ours, or the server wants the item stopped (`lease.stopping`). Raises `NotOurs`."""
    try:
        await api.beta.environments.work.ack(job.work_id, environment_id=job.environment_id)
    except anthropic.APIStatusError as error:
        if error.status_code in REFUSED:
            raise NotOurs(f"the ack was refused ({error.status_code})") from None
        # A conflict or a server error decides nothing: the claim will tell.
    except anthropic.APIError:
        pass
    sent_at = lease.now()
    try:
        answer = await beat(api, job, NO_HEARTBEAT)
    except anthropic.APIError as error:
        status = error.status_code if isinstance(error, anthropic.APIStatusError) else None
        if status is not None and status < 500 and status not in UNDECIDED:
            raise NotOurs(f"the claim was refused ({status})") from None
        sent_at, answer = await _settle_unknown_claim(api, job, lease, settle_seconds)
    note_beat(lease, answer, sent_at)
    if lease.lost.is_set():
        raise NotOurs("the item is another runner's, and about to be stopped")


async def _settle_unknown_claim(
    api: AsyncAnthropic, job: RunnerJob, lease: Lease, settle_seconds: float
) -> tuple[float, BetaSelfHostedWorkHeartbeatResponse]:
    """The claim was sent and not answered (R2). If a heartbeat was recorded and then stands still for longer than any
    runner's does, nobody else is beating: it is ours. If it moves, it is another runner's. If there is none, we claim
    again."""
    for _ in range(_SETTLE_ATTEMPTS):
        first = await probe(api, job)
        if first is None or first.last_heartbeat is not None:
            await asyncio.sleep(settle_seconds)
            again = await probe(api, job)
            if first is None or again is None:
                continue
            if again != first:
                raise NotOurs("the claim was not answered, and another runner beats the item")
        lease.last_heartbeat = first.last_heartbeat
        sent_at = lease.now()
        try:
            return sent_at, await beat(api, job, first.last_heartbeat or NO_HEARTBEAT)
        except anthropic.APIStatusError as error:
            if error.status_code in REFUSED:
                raise NotOurs(f"the claim was refused ({error.status_code})") from None
            # A 412 now: the first claim arrived late, or another runner's did. The next round tells them apart.
        except anthropic.APIError:
            pass
        await asyncio.sleep(min(_PAUSE_SECONDS, settle_seconds))
    raise NotOurs("the claim was not answered")
