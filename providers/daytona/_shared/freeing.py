"""Items that no runner holds and that the server does not let go: healing ends them, behind a fence (R9, P10).

Usually a lease that nobody extends lapses by itself within six minutes. Some servers never let an item lapse that was
acked and never claimed, and one whose sweeper is down lets none. Such a session would wait for ever with a live item.

The fence is a heartbeat on a condition that holds only while nobody else beats: that there was none yet, or that the
last one is the very one that is long gone. A runner that is alive after all makes it fail, and one that comes back
later finds that it has lost its lease, before it runs or stops anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

import anthropic
from anthropic import AsyncAnthropic
from anthropic.types.beta.environments import BetaSelfHostedWork

from . import log
from .runner_lease import NO_HEARTBEAT, lease_state

STARTING_SECONDS = 150.0  # an acked item is claimed within milliseconds; this is longer than any launch may take
_CANNOT_MATCH = "2000-01-01T00:00:00.000000Z"  # no live item has this heartbeat
SILENT_SECONDS = 600.0  # a lease lapses 300 to 360 s after its last beat; what lives this long does not lapse

_log = logging.getLogger(__name__)


class Freeing:
    """Stops such items. It remembers nothing."""

    def __init__(self, client: AsyncAnthropic, environment_id: str) -> None:
        self._client = client
        self._environment_id = environment_id

    def is_due(self, item: BetaSelfHostedWork, age: Callable[[str | None], float]) -> bool:
        """Whether nobody can hold the item any more. `age` says how many seconds ago something was, by the server's
        clock, and 0 for what never happened."""
        if item.state == "starting" and not item.latest_heartbeat_at:
            return age(item.acknowledged_at) > STARTING_SECONDS
        if item.state == "stopping":
            return age(item.stop_requested_at) > SILENT_SECONDS
        return item.state in ("starting", "active") and age(item.latest_heartbeat_at) > SILENT_SECONDS

    async def free(self, item: BetaSelfHostedWork) -> bool:
        """Stops the item unless somebody holds it. Raises `anthropic.APIError`."""
        if not await (self._is_stopping(item) if item.state == "stopping" else self._is_ours(item)):
            return False
        # Sent once: when its answer is lost, the item may be queued again before a second one arrives.
        work = self._client.with_options(max_retries=0).beta.environments.work
        await work.stop(item.id, environment_id=self._environment_id, force=True)
        reason = f"{item.state} and held by nobody: stopped, so that it can be queued again"
        _log.warning(log.line("healed", session=item.data.id, work=item.id, reason=reason))
        return True

    async def _is_stopping(self, item: BetaSelfHostedWork) -> bool:
        """Who asked for that stop asked for this one too, unless another host has completed it, and the session is
        queued again. A beat changes nothing about an item that is stopping, and this one nothing about any other."""
        work = self._client.with_options(max_retries=0).beta.environments.work
        try:
            beat = await work.heartbeat(
                item.id, environment_id=self._environment_id, expected_last_heartbeat=_CANNOT_MATCH
            )
        except anthropic.APIStatusError as error:
            if error.status_code in (404, 409, 412):
                return False
            raise
        return beat.state == "stopping"

    async def _is_ours(self, item: BetaSelfHostedWork) -> bool:
        """Takes the lease, if its last heartbeat is still the one that was listed."""
        listed = item.latest_heartbeat_at
        current = await self._beat(item, listed or NO_HEARTBEAT)
        if current is not None and listed and current and _moment(current) == _moment(listed):
            current = await self._beat(item, current)  # the same one, as the server writes it here
        return current is None

    async def _beat(self, item: BetaSelfHostedWork, expected: str) -> str | None:
        """None when the beat was recorded, and the lease is ours; else the server's own last heartbeat, or nothing."""
        work = self._client.with_options(max_retries=0).beta.environments.work
        try:
            beat = await work.heartbeat(item.id, environment_id=self._environment_id, expected_last_heartbeat=expected)
        except anthropic.APIStatusError as error:
            if error.status_code == 412:
                return lease_state(error.body).last_heartbeat or ""
            raise
        return None if beat.lease_extended else ""


def _moment(timestamp: str) -> datetime | None:
    try:
        return datetime.fromisoformat(timestamp)
    except ValueError:
        return None
