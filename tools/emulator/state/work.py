"""The work queue of one environment: hand-out, acknowledgement, lease, stop. Pure: every rule takes the time.

Recorded: the order of the timestamps, the stop that waits for the next beat, the lapse that stops the item and leaves
the session alone. Documented: the reclaim window and the statistics. The rest is inferred, and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from ..clock import stamp
from ..errors import Conflict, HeartbeatPreconditionFailed, Invalid, NotFound
from ..switches import Switches
from .agenda import Agenda
from .ids import new_id

NO_HEARTBEAT = "NO_HEARTBEAT"
RECLAIM_AFTER = timedelta(milliseconds=5000)
WORKER_SEEN = timedelta(seconds=30)
LONGEST_SWEEP = timedelta(seconds=60)
TICK = timedelta(microseconds=1)
LEASED = ("starting", "active", "stopping")


@dataclass
class Milestone:
    """What has become of an item: queued, reserved, acked, claimed, stopping, stopped or lapsed."""

    name: str
    at: datetime
    times: int = 1
    """How often in a row; `at` is the first."""


@dataclass
class WorkItem:
    """One session's place in the queue. A re-queue reuses the object, so a session never has two."""

    id: str
    environment_id: str
    session_id: str
    created_at: datetime
    queued_at: datetime
    ttl: timedelta
    kind: str = "session"
    """`session`, or `healthcheck`: an item workers must skip and force-stop (SDK)."""
    state: str = "queued"
    metadata: dict[str, str] = field(default_factory=dict)
    started_at: datetime | None = None
    acknowledged_at: datetime | None = None
    latest_heartbeat_at: datetime | None = None
    stop_requested_at: datetime | None = None
    stopped_at: datetime | None = None
    last_stopped_at: datetime | None = None
    """Like `stopped_at`, but kept through a re-queue: the age of the tokens of the claim that ended then."""
    is_frozen: bool = False
    """Acknowledged while `never_beaten` is `frozen`: no lease runs before the first beat."""
    epoch: int = 0
    """How many leases the item has had: a first beat takes the next one. No server shows it."""
    milestones: list[Milestone] = field(default_factory=list)
    """Everything since its creation, also what a re-queue wipes from the fields above. No server shows it."""

    def note(self, name: str, now: datetime) -> None:
        if self.milestones and self.milestones[-1].name == name:
            self.milestones[-1].times += 1
        else:
            self.milestones.append(Milestone(name, now))

    @property
    def is_live(self) -> bool:
        return self.state != "stopped"

    @property
    def expires_at(self) -> datetime | None:
        """When the lease ends: a TTL after the last beat, or (inferred) after the ack of an item never beaten."""
        if self.state not in LEASED:
            return None
        last = self.latest_heartbeat_at or (None if self.is_frozen else self.acknowledged_at)
        return last + self.ttl if last else None

    @property
    def last_heartbeat(self) -> str | None:
        return stamp(self.latest_heartbeat_at) if self.latest_heartbeat_at else None


class WorkQueue:
    def __init__(
        self,
        environment_id: str,
        switches: Switches,
        lease_ttl: timedelta,
        sweeps_from: datetime,
        stirred: dict[str, None] | None = None,
    ) -> None:
        self.environment_id = environment_id
        self._switches = switches
        self._stirred = {} if stirred is None else stirred
        self._ttl = lease_ttl
        # Recorded: 360.7 s from the last beat to the stop at a TTL of 300 s, so a sweeper looks about once a minute.
        # A shorter TTL gets a shorter period, in the same proportion.
        self._sweep_period = min(LONGEST_SWEEP, lease_ttl / 5)
        self._sweeps_from = sweeps_from
        self._items: dict[str, WorkItem] = {}
        self._of_session: dict[str, WorkItem] = {}
        self._queued: dict[str, WorkItem] = {}  # the oldest first
        self._leases: Agenda[WorkItem] = Agenda(self._lapses_at, lambda item: item.id)
        self._polled: dict[str, datetime] = {}  # whoever was heard of last is last

    def enqueue(self, session_id: str, now: datetime) -> WorkItem:
        """Queue the session unless it has a live item. A re-queue keeps the id (recorded)."""
        item = self.of_session(session_id)
        if item is None:
            work_id = session_id if self._switches.work_id == "session_id" else new_id("work")
            item = WorkItem(work_id, self.environment_id, session_id, now, now, self._ttl)
            self._add(item, now)
        elif not item.is_live:
            self._requeue(item, now)
        return item

    def add_healthcheck(self, now: datetime) -> WorkItem:
        item = WorkItem(new_id("work"), self.environment_id, new_id("hchk"), now, now, self._ttl, kind="healthcheck")
        self._add(item, now)
        return item

    def _add(self, item: WorkItem, now: datetime) -> None:
        self._items[item.id] = self._of_session[item.session_id] = item
        self._offer(item, now)

    def _offer(self, item: WorkItem, now: datetime) -> None:
        self._queued[item.id] = item
        self._stirred[self.environment_id] = None
        item.note("queued", now)

    def _requeue(self, item: WorkItem, now: datetime) -> None:
        item.state = "queued"
        if self._switches.created_at_after_requeue == "new":
            item.created_at = now
        item.queued_at = now
        item.ttl = self._ttl
        item.started_at = item.acknowledged_at = item.latest_heartbeat_at = None
        item.stop_requested_at = item.stopped_at = None
        self._offer(item, now)

    def find(self, work_id: str) -> WorkItem | None:
        return self._items.get(work_id)

    def get(self, work_id: str) -> WorkItem:
        item = self.find(work_id)
        if item is None:
            raise NotFound(f"work item {work_id} not found in environment {self.environment_id}")
        return item

    def of_session(self, session_id: str) -> WorkItem | None:
        return self._of_session.get(session_id)

    def remove(self, session_id: str) -> None:
        item = self._of_session.pop(session_id, None)
        if item is not None:
            del self._items[item.id]
            self._queued.pop(item.id, None)

    def healthchecks(self) -> list[WorkItem]:
        return [item for item in self._items.values() if item.kind == "healthcheck"]

    def newest_first(self) -> list[WorkItem]:
        return sorted(self._items.values(), key=lambda item: item.created_at, reverse=True)

    # Hand-out

    def note_poll(self, worker_id: str, now: datetime) -> None:
        self._polled.pop(worker_id, None)
        self._polled[worker_id] = now
        while now - next(iter(self._polled.values())) > WORKER_SEEN:
            del self._polled[next(iter(self._polled))]

    def workers(self, now: datetime) -> dict[str, datetime]:
        """Those that have polled of late, and when each did last."""
        return {worker: seen for worker, seen in self._polled.items() if now - seen <= WORKER_SEEN}

    def hand_out(self, now: datetime, reclaim_after: timedelta = RECLAIM_AFTER) -> WorkItem | None:
        """The oldest item nobody holds. It stays `queued`; `started_at` is stamped here, before the ack (recorded)."""
        for item in self._queued.values():
            if item.started_at is None or item.started_at + reclaim_after <= now:
                self.reserve(item, now)
                return item
        return None

    @staticmethod
    def reserve(item: WorkItem, now: datetime) -> None:
        item.started_at = now
        item.note("reserved", now)

    def ack(self, work_id: str, now: datetime) -> WorkItem:
        """`queued` to `starting`. Any other ack changes nothing; its status is open, two switches."""
        item = self.get(work_id)
        if item.state == "queued":
            item.state = "starting"
            item.acknowledged_at = now
            item.is_frozen = self._switches.never_beaten == "frozen"
            item.note("acked", now)
            del self._queued[work_id]
            self._leases.note(item)
        elif item.state == "stopped" and self._switches.ack_on_stopped == 404:
            raise NotFound(f"work item {work_id} is stopped")
        elif item.state == "stopped" or self._switches.ack_on_claimed == 409:
            raise Conflict(f"work item {work_id} is {item.state}")
        return item

    # Lease

    def heartbeat(self, work_id: str, now: datetime, expected: str | None, ttl: timedelta | None) -> bool:
        """Record a beat and say whether it extended the lease.

        While the item is stopping or stopped nothing is compared and nothing moves (SDK docstring; recorded).
        """
        item = self.get(work_id)
        if item.state in ("stopping", "stopped"):
            return False
        if item.state == "queued":
            self._refuse_beat_on_queued(item)
        if expected is not None and expected != (item.last_heartbeat or NO_HEARTBEAT):
            raise HeartbeatPreconditionFailed(self.lease_state(item))
        item.latest_heartbeat_at = max(now, item.latest_heartbeat_at + TICK) if item.latest_heartbeat_at else now
        item.ttl = ttl or item.ttl
        if item.state == "starting":
            item.epoch += 1
            item.note("claimed", now)
        item.state = "active"
        self._leases.note(item)
        return True

    def _refuse_beat_on_queued(self, item: WorkItem) -> None:
        if self._switches.heartbeat_on_queued == 404:
            raise NotFound(f"work item {item.id} is not leased")
        if self._switches.heartbeat_on_queued == 409:
            raise Conflict(f"work item {item.id} is queued")
        raise HeartbeatPreconditionFailed(self.lease_state(item))

    @staticmethod
    def lease_state(item: WorkItem) -> dict[str, object]:
        return {
            "state": item.state,
            "last_heartbeat": item.last_heartbeat,
            "lease_extended": False,
            "ttl_seconds": int(item.ttl.total_seconds()),
        }

    def next_lapse(self) -> tuple[datetime, WorkItem] | None:
        """The item whose lease the sweeper ends next, and when: at its first visit after the lease has run out."""
        return self._leases.first()

    def _lapses_at(self, item: WorkItem) -> datetime | None:
        if item.expires_at is None or self._items.get(item.id) is not item or self._switches.lease_lapse == "never":
            return None
        return self._sweep_after(item.expires_at)

    def _sweep_after(self, moment: datetime) -> datetime:
        periods = math.ceil((moment - self._sweeps_from) / self._sweep_period)
        return self._sweeps_from + periods * self._sweep_period

    def lapse(self, item: WorkItem, now: datetime) -> None:
        item.note("lapsed", now)
        if self._switches.lease_lapse == "requeue" and item.state != "stopping":
            self._requeue(item, now)
            return
        item.stop_requested_at = item.stop_requested_at or now
        self._end(item, now)

    def _end(self, item: WorkItem, now: datetime) -> None:
        item.state = "stopped"
        item.stopped_at = item.last_stopped_at = now
        item.note("stopped", now)
        self._queued.pop(item.id, None)

    # Stop

    def stop(self, work_id: str, now: datetime, *, force: bool) -> WorkItem:
        """Graceful: an active item waits in `stopping` for its worker; one that never beat is stopped (inferred)."""
        item = self.get(work_id)
        if item.state == "stopped":
            raise Conflict(f"work item {work_id} is already stopped")
        item.stop_requested_at = item.stop_requested_at or now
        if force or item.state in ("queued", "starting"):
            is_apart = force and self._switches.force_stop_stamps == "different"
            self._end(item, max(now, item.stop_requested_at + TICK) if is_apart else now)
        elif item.state != "stopping":
            item.state = "stopping"
            item.note("stopping", now)
        return item

    def update_metadata(self, work_id: str, patch: dict[str, str | None]) -> WorkItem:
        item = self.get(work_id)
        merge(item.metadata, patch)
        return item

    # Statistics

    def stats(self, now: datetime) -> dict[str, object]:
        """Documented: an item handed out but not acknowledged is pending, an acknowledged one counts nowhere."""
        queued = list(self._queued.values())
        oldest = min((item.queued_at for item in queued), default=None)
        return {
            "type": "work_queue_stats",
            "depth": sum(item.started_at is None for item in queued),
            "pending": sum(item.started_at is not None for item in queued),
            "oldest_queued_at": stamp(oldest) if oldest else None,
            "workers_polling": len(self.workers(now)),
        }


def merge(metadata: dict[str, str], patch: dict[str, str | None], most: int | None = None) -> None:
    """The merge patch of every metadata field: a string sets the key, null deletes it; `most` may be left after it."""
    if any(not key for key in patch):
        raise Invalid("metadata: keys must not be empty")
    left = {key for key in metadata if patch.get(key, "") is not None} | {
        key for key in patch if patch[key] is not None
    }
    if most is not None and len(left) > most:
        raise Invalid(f"metadata: {len(left)} keys, and at most {most} may be")
    for key, value in patch.items():
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
