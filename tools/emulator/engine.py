"""The world behind one lock, and the bell that wakes whoever waits for it to change.

Requests run on the server's event loop, tests on threads of their own; both go through `transact`. Waiters on threads
use the condition, waiters on the loop an `asyncio.Event` each, so no request polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import TypeVar

from .clock import Clock
from .state import World
from .state.narration import Notify
from .switches import Switches

T = TypeVar("T")

ASK_AGAIN_SECONDS = 0.5  # of a waiting thread, beside every change


class Engine:
    def __init__(self, clock: Clock, switches: Switches, lease_ttl: timedelta, notify: Notify) -> None:
        self.clock = clock
        self.switches = switches
        self.world = World(switches, lease_ttl, notify, clock.now())
        self.is_closing = False
        self._changed = threading.Condition(threading.RLock())
        self._listeners: dict[str | None, dict[asyncio.Event, None]] = {}  # woken in the order of listening
        self._loop: asyncio.AbstractEventLoop | None = None
        clock.on_jump(self._catch_up)

    # Changing the world

    @contextlib.contextmanager
    def transact(self) -> Iterator[datetime]:
        """Hold the lock with leases and sleeps brought up to date; yields the time. Wakes everybody on a change."""
        with self._changed:
            now = self.clock.now()
            before = self.world.changes
            self.world.tick(now)
            try:
                yield now
            finally:
                if self.world.changes != before:
                    self.ring()

    def _catch_up(self) -> None:
        with self.transact():
            self.ring(everybody=True)

    def ring(self, *, everybody: bool = False) -> None:
        """Wake whoever listens to everything and to what has stirred: the world or a record of it has changed.

        Everybody: the clock has jumped, or it is all over.
        """
        with self._changed:
            self._changed.notify_all()
            topics: list[str | None] = list(self._listeners) if everybody else [None, *self.world.stirred]
            self.world.stirred.clear()
            if self._loop is not None and any(topic in self._listeners for topic in topics):
                self._loop.call_soon_threadsafe(self._wake, topics)

    # Waiting on a thread

    def wait_until(self, predicate: Callable[[], T], timeout: float) -> T:
        """The predicate's first true value; TimeoutError after `timeout` seconds of real time. It is asked again at
        every change, and now and then: what it looks at need not be the state, such as the log of requests."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (value := predicate()):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"not true within {timeout} s of real time")
                self._changed.wait(min(left, ASK_AGAIN_SECONDS))
            return value

    # Waiting on the event loop

    def on_loop(self, callback: Callable[[], None]) -> None:
        """Call back on the server's loop, from any thread; nothing happens while no server runs."""
        with self._changed:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback)

    def _wake(self, topics: Iterable[str | None]) -> None:
        with self._changed:
            for topic in topics:
                for event in self._listeners.get(topic, ()):
                    event.set()

    @contextlib.contextmanager
    def listen(self, topic: str | None = None) -> Iterator[asyncio.Event]:
        """An event that every ring sets. Clear it before looking at the world, then wait.

        With a topic, the id of a session or of an environment, only what concerns its events or its queue sets it: a
        thousand streams do not all look up at every request.
        """
        event = asyncio.Event()
        with self._changed:
            self._listeners.setdefault(topic, {})[event] = None
        try:
            yield event
        finally:
            with self._changed:
                del self._listeners[topic][event]
                if not self._listeners[topic]:
                    del self._listeners[topic]

    async def wait_for_instant(self, moment: datetime) -> None:
        """Return once the emulator's clock shows `moment`, or the emulator closes."""
        with self.listen() as changed:
            while not self.is_closing and (left := (moment - self.clock.now()).total_seconds()) > 0:
                changed.clear()
                await wait_event(changed, left)

    async def keep_time(self) -> None:
        """Let leases lapse and scripts go on when nobody asks. Ends when the emulator closes."""
        with self.listen() as changed:
            while not self.is_closing:
                changed.clear()
                with self.transact() as now:
                    due = self.world.next_due()
                await wait_event(changed, (due - now).total_seconds() if due else None)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_closing = False
        self._loop = loop

    def close(self) -> None:
        """End every wait on the loop: streams finish and the server can stop."""
        self.is_closing = True
        self.ring(everybody=True)

    def detach(self) -> None:
        """The loop is about to end: ring threads only."""
        with self._changed:
            self._loop = None


async def wait_event(event: asyncio.Event, seconds: float | None) -> bool:
    """Whether the event was set within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
