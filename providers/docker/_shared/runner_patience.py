"""How long a runner stays while only somebody else can go on: a person with a word, another client with the result of
its tool, anybody with a first message. The SDK's own clock counts after the end of a turn only, so that such a session
would hold its sandbox and its lease for ever. What it waits for queues it again when it comes.
"""

from __future__ import annotations

import asyncio

from .runner_events import EventLog
from .runner_tools import Guard

_SHORTEST_LOOK_SECONDS = 0.05
_LONGEST_LOOK_SECONDS = 5.0  # a sleep does not count the time a machine was suspended


class Patience:
    """`is_over` is set once nothing has happened for `seconds` in a session that waits, while no call of ours ran."""

    def __init__(self, log: EventLog, guard: Guard, seconds: float) -> None:
        self._log = log
        self._guard = guard
        self.seconds = seconds
        self.is_over = asyncio.Event()

    async def watch(self) -> None:
        """Looks for ever. Cancel it."""
        while True:
            left = self.seconds
            if self._log.is_read and not self._guard.running and self._log.only_waits(self._guard.owned):
                left -= self._log.quiet_seconds
                if left <= 0:
                    self.is_over.set()
            await asyncio.sleep(min(max(left, _SHORTEST_LOOK_SECONDS), _LONGEST_LOOK_SECONDS))

    def begin_again(self) -> None:
        """The session turned out not to wait, or could not be left."""
        self._log.touch()
        self.is_over.clear()
