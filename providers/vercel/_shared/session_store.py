"""What must be remembered across processes where a provider or platform cannot: the store behind R8 and, on some, R10.

Every write is one atomic step; never get-then-set. A claim has an owner, so that a slow owner cannot release what has
meanwhile become somebody else's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class SessionStore(Protocol):
    """Keys to short texts, with owners and time limits. Times are seconds."""

    async def get(self, key: str) -> str | None: ...

    async def claim(self, key: str, owner: str, ttl_seconds: float) -> bool:
        """Sets `key` to `owner` if it is unset or already this owner's; True when it is now this owner's."""
        ...

    async def release(self, key: str, owner: str) -> None:
        """Unsets `key` if it is this owner's."""
        ...

    async def increment(self, key: str, ttl_seconds: float) -> int:
        """Adds one to a counter that ends `ttl_seconds` after its first increment; returns its value."""
        ...


class MemorySessionStore:
    """A store for one process: every method is one step of the event loop, so each is atomic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[str, tuple[str, float]] = {}

    async def get(self, key: str) -> str | None:
        return self._get(key)

    async def claim(self, key: str, owner: str, ttl_seconds: float) -> bool:
        if self._get(key) not in (None, owner):
            return False
        self._values[key] = (owner, self._clock() + ttl_seconds)
        return True

    async def release(self, key: str, owner: str) -> None:
        if self._get(key) == owner:
            del self._values[key]

    async def increment(self, key: str, ttl_seconds: float) -> int:
        current = self._get(key)
        ends = self._values[key][1] if current is not None else self._clock() + ttl_seconds
        value = int(current or 0) + 1
        self._values[key] = (str(value), ends)
        return value

    def _get(self, key: str) -> str | None:
        value, ends = self._values.get(key, ("", 0.0))
        if ends > self._clock():
            return value
        self._values.pop(key, None)
        return None
