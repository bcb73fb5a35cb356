"""How long a runner stays while only somebody else can go on: a person with a word, another client with the result of
its tool, anybody with a first message. The SDK's own clock counts after the end of a turn only, so that such a session
would hold its sandbox and its lease for ever. What it waits for queues it again when it comes. A first message is
waited for no longer than the next one: a session that is created to be used later costs no more than one that was.
"""

from __future__ import annotations

import asyncio

from .runner_events import EventLog
from .runner_tools import Guard

_SHORTEST_LOOK_SECONDS = 0.05
_LONGEST_LOOK_SECONDS = 5.0  # a sleep does not count the time a machine was suspended


class Patience:
    """`is_over` is set once nothing has happened for `seconds` in a session that waits, while no call of ours ran."""

    def __init__(self, log: EventLog, guard: Guard, seconds: float, *, first: float) -> None:
        """Waits for `seconds`, and for a first message no longer than `first`."""
        self._log = log
        self._guard = guard
        self._seconds = seconds
        self._first_seconds = min(first, seconds)
        self.is_over = asyncio.Event()
        self._waited_for = log.waits_for

    async def watch(self) -> None:
        """Looks for ever. Cancel it."""
        while True:
            left = self._first_seconds if self._log.turn == "none" else self._seconds
            if self._log.is_read and not self._guard.running and self._log.only_waits(self._guard.owned):
                left -= self._log.quiet_seconds
                if left <= 0:
                    self._waited_for = self._log.waits_for
                    self.is_over.set()
            await asyncio.sleep(min(max(left, _SHORTEST_LOOK_SECONDS), _LONGEST_LOOK_SECONDS))

    def is_justified(self, log: EventLog) -> bool:
        """Whether the session, by its whole log as it is now, still only waits, and for what patience ended over."""
        return log.only_waits(self._guard.owned) and log.waits_for == self._waited_for

    def begin_again(self) -> None:
        """The session turned out not to wait, or could not be left."""
        self._log.touch()
        self.is_over.clear()
