"""The emulator's time: the real one plus an offset that tests can push forward."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

MOST_SECONDS = 10 * 365 * 86400.0


def span(seconds: float, name: str = "seconds") -> timedelta:
    """ValueError for what is further from now than ten years: of dates there is an end."""
    if not abs(seconds) <= MOST_SECONDS:  # neither is nan
        raise ValueError(f"{name}: {seconds} is not a number of seconds within ten years")
    return timedelta(seconds=seconds)


class Clock:
    """Real time that never runs backwards, plus everything `advance` added.

    Thread-safe. A jump calls the registered listeners in the thread that jumps, after the clock shows the new time, so
    whoever waits for an instant of this clock (leases, scripted sleeps, webhook retries) can look again.
    """

    def __init__(self, start: datetime | None = None) -> None:
        self._start = start or datetime.now(UTC)
        self._zero = time.monotonic()
        self._offset = timedelta()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self.skew = timedelta()
        """How far the time that clients are shown is off; no rule looks at it."""

    def now(self) -> datetime:
        with self._lock:
            return self._start + timedelta(seconds=time.monotonic() - self._zero) + self._offset

    def advance(self, seconds: float) -> None:
        """Jump `seconds` ahead. ValueError when negative, as leases would come back to life, and when it is then more
        than ten years ahead."""
        if seconds < 0:
            raise ValueError("the clock only goes forward")
        with self._lock:
            self._offset = span(self._offset.total_seconds() + seconds, "advance")
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    @property
    def advanced(self) -> timedelta:
        """How far it has been pushed forward in all."""
        with self._lock:
            return self._offset

    def on_jump(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.append(listener)


def stamp(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds and `Z`, as every recorded timestamp."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
