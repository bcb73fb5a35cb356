"""What one invocation of the function does: it answers at once, and works on until shortly before its deadline.

An invocation may be frozen or ended at any moment. So it owns all it does: a dispatcher of its own, whose launches are
cancelled at the deadline, and leases in the store that end by themselves when nobody renews them. What was not launched
is un-acked, and the queue offers it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

from vercel.functions import get_deadline, wait_until

from _shared.dispatcher import Dispatcher, open_client
from _shared.log import bug, line
from _shared.settings import Settings
from _shared.webhook import Verifier
from sandbox import VercelProvider
from store import UpstashSessionStore, lease

_log = logging.getLogger(__name__)

END_SECONDS = 10.0  # before the platform's deadline: time to cancel, to give leases back, and to log
UNKNOWN_SECONDS = 240.0  # where the platform names no deadline, as outside of it
SWEEP_SECONDS = 60.0  # a webhook sweeps, too, when nobody has for so long: not every plan has a cron for each minute
_SIGNALS_SECONDS = 86400.0


@dataclass
class Host:
    """What this instance of the function serves with."""

    settings: Settings
    provider: VercelProvider
    store: UpstashSessionStore | None
    verifier: Verifier
    cron_secret: str | None = field(repr=False)
    status_key: str | None = field(repr=False)
    working: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    _swept_at: float = float("-inf")

    def wake(self, _event: object = None) -> None:
        """There may be work. Returns at once; the invocation goes on."""
        self._go_on(self._drain)

    def sweep(self) -> None:
        """The periodic sweep. Returns at once; the invocation goes on."""
        self._go_on(self._sweep)

    def _go_on(self, work: Callable[[Dispatcher], Awaitable[None]]) -> None:
        deadline = get_deadline()
        left = (deadline - datetime.now(UTC)).total_seconds() - END_SECONDS if deadline else UNKNOWN_SECONDS
        task = asyncio.create_task(self._work(work, left))
        self.working.add(task)
        task.add_done_callback(self._end)
        wait_until(task)

    def _end(self, task: asyncio.Task[None]) -> None:
        self.working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            bug(_log, "failed", error)

    async def _work(self, work: Callable[[Dispatcher], Awaitable[None]], seconds: float) -> None:
        dispatcher = Dispatcher(client=open_client(self.settings), settings=self.settings, provider=self.provider)
        ends = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds) as budget:
                await work(dispatcher)
        except TimeoutError:
            if not budget.expired():
                raise
            _log.warning(line("deadline", reason="the invocation's time is up; what was not launched stays queued"))
        finally:
            await dispatcher.close(max(0.0, ends - time.monotonic()))

    async def _drain(self, dispatcher: Dispatcher) -> None:
        """Polls until the queue is empty, one instance at a time (R8). Another instance's signal, which found this one
        polling, makes it poll once more."""
        if self.store is None:
            await dispatcher.poll()
        else:
            await self.store.increment("signals", _SIGNALS_SECONDS)
            seen: str | None = ""
            while seen != (signals := await self.store.get("signals")):
                async with lease(self.store, "drain") as is_ours:
                    if not is_ours:
                        break
                    seen = signals
                    await dispatcher.poll()
                if seen is None:
                    break  # the store does not answer
        if await self._sweep_is_due():
            await self._sweep(dispatcher)

    async def _sweep(self, dispatcher: Dispatcher) -> None:
        async with lease(self.store, "sweep") as is_ours:
            if not is_ours:
                _log.info(line("sweep_skipped", reason="another instance sweeps"))
                return
            self._swept_at = time.monotonic()
            if self.store is not None:
                await self.store.claim("swept", uuid4().hex, SWEEP_SECONDS)
            await dispatcher.sweep()

    async def _sweep_is_due(self) -> bool:
        if time.monotonic() - self._swept_at < SWEEP_SECONDS:
            return False
        self._swept_at = time.monotonic()  # as far as this instance knows
        return self.store is None or await self.store.get("swept") is None
