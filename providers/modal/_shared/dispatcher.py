"""From the queue to running sandboxes: reserve, launch, and never ack (P2, R7, R8).

The item stays un-acked until a loaded runner acks it inside the sandbox, so a launch that fails anywhere loses nothing:
the queue offers the item again by itself once RECLAIM_SECONDS have passed. That is also why no foreign poller may share
the environment: one with a shorter reclaim window would be handed items that are being launched here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Sequence

import anthropic
from anthropic import AsyncAnthropic
from anthropic.types.beta.environments import BetaSelfHostedWork

from . import log
from .fleet import CALL_SECONDS, Fleet
from .healing import Healer
from .launching import LAUNCH_SECONDS, RETRY_PAUSES, Launcher, pause_after
from .provider import Provider
from .runner_pages import RefusePages
from .settings import Settings
from .webhook import WebhookEvent

RECLAIM_SECONDS = 120.0
DRAIN_SECONDS = 240.0  # one drain polls no longer than this; the next signal or sweep goes on
POLL_ATTEMPTS = 3

_log = logging.getLogger(__name__)


def open_client(settings: Settings) -> AsyncAnthropic:
    """The host's client: it holds the environment key and talks to nothing but the queue and its sessions."""
    return AsyncAnthropic(
        auth_token=settings.environment_key,
        base_url=settings.base_url,
        max_retries=2,
        timeout=30.0,
        middleware=[RefusePages()],
    )


class Dispatcher:
    """One host process's share of an environment."""

    def __init__(
        self,
        *,
        client: AsyncAnthropic,
        settings: Settings,
        provider: Provider,
        drain_seconds: float = DRAIN_SECONDS,
        launch_seconds: float = LAUNCH_SECONDS,
        call_seconds: float = CALL_SECONDS,
        retry_pauses: Sequence[float] = RETRY_PAUSES,
    ) -> None:
        self._client = client
        self._settings = settings
        self._provider = provider
        self._healer = Healer(client, settings)
        self._fleet = Fleet(provider, settings, call_seconds=call_seconds)
        self._launcher = Launcher(client, settings, provider, launch_seconds=launch_seconds, retry_pauses=retry_pauses)
        self._worker_id = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"  # one a process, as the API documents it
        self._drain_seconds = drain_seconds
        self._retry_pauses = retry_pauses
        self._slots = asyncio.Semaphore(settings.launch_concurrency)
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None
        self._launches: dict[str, asyncio.Task[None]] = {}  # by session: one at a time for each
        self._closing = False

    def wake(self, _event: object = None) -> None:
        """Says that there may be work, and returns at once. A signal during a drain makes it poll once more."""
        if self._closing:
            return
        self._signalled = True
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
            self._draining.add_done_callback(lambda task: _log_if_failed(task, "drain"))

    def suspect(self, event: WebhookEvent) -> None:
        """Takes a webhook that tells of no work, but of a session that may be stranded: the next sweeps look at it
        first (R9)."""
        self._healer.hint(event.session_id)

    async def drain(self) -> None:
        """Polls until the queue is empty and waits for the launches that came of it."""
        await self.poll()
        if self._launches:
            await asyncio.wait(list(self._launches.values()))

    async def poll(self) -> None:
        """Polls until the queue is empty. The launches that came of it go on: `close` waits for them."""
        self.wake()
        if (draining := self._draining) is not None:
            await asyncio.wait([draining])
            if not draining.cancelled():
                draining.result()

    async def sweep(self) -> None:
        """What must happen even when no webhook ever arrives (P1): drain, heal, renew, clean up. Run it each minute."""
        began = time.monotonic()
        await self.drain()
        items, sandboxes = await self._healer.list_work(), await self._fleet.list()
        await self._fleet.renew(items, sandboxes or [])
        if items is not None:
            if await self._healer.heal(items):
                await self.drain()
            await self._fleet.clean_up(items, sandboxes or [], self._launches.keys())
        await self._fleet.tidy()
        _log.info(log.line("sweep", provider=self._provider.name, ms=log.ms(began)))

    async def close(self, grace_seconds: float) -> None:
        """Claims nothing more, gives the poll and the launches under way `grace_seconds` to finish, then cancels them;
        their items are un-acked and will be offered again."""
        self._closing, self._signalled = True, False
        deadline = time.monotonic() + grace_seconds
        while (under_way := self._under_way()) and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(under_way, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._client.close()

    def _under_way(self) -> list[asyncio.Task[None]]:
        draining = [self._draining] if self._draining is not None and not self._draining.done() else []
        return [*draining, *self._launches.values()]

    # --- drain -------------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._drain_seconds
        while self._signalled and time.monotonic() < deadline:
            if not await self._fleet.has_room(self._launches.keys()):
                return
            await self._slots.acquire()  # before the poll, so that nothing waits reserved (P8)
            launched = False
            try:
                if self._closing:
                    return
                self._signalled = False  # before the poll: a signal after it must not be lost
                item = await self._poll()
                launched = item is not None and self._begin(item)
                self._signalled |= item is not None and not self._closing
            finally:
                if not launched:
                    self._slots.release()

    async def _poll(self) -> BetaSelfHostedWork | None:
        """The next item, or None when the queue is empty or will not answer now; the sweep comes back to it."""
        work = self._client.with_options(max_retries=0).beta.environments.work
        for attempt in range(1, POLL_ATTEMPTS + 1):
            if attempt > 1:
                await asyncio.sleep(pause_after(attempt - 1, self._retry_pauses))
            try:
                item = await work.poll(
                    self._settings.environment_id,
                    reclaim_older_than_ms=int(RECLAIM_SECONDS * 1000),
                    anthropic_worker_id=self._worker_id,
                )
            except anthropic.RateLimitError as error:
                _log.warning(log.line("poll", error=error, reason="the API asks to slow down; the next sweep goes on"))
                return None
            except (anthropic.AuthenticationError, anthropic.PermissionDeniedError) as error:
                reason = "the environment key is not accepted: check ANTHROPIC_ENVIRONMENT_KEY and ..._ENVIRONMENT_ID"
                _log.error(log.line("poll", error=error, reason=reason))
                return None
            except anthropic.APIError as error:
                _log.warning(log.line("poll", attempt=attempt, error=error))
            else:
                # The SDK checks no shapes: `{}` comes as an item without an id, a proxy's page as its text.
                return item if isinstance(item, BetaSelfHostedWork) and item.id else None
        return None

    def _begin(self, item: BetaSelfHostedWork) -> bool:
        """Starts the launch of a reserved item. The slot is the launch's from here on."""
        session_id = str(getattr(item.data, "id", None) or item.id)
        if session_id in self._launches:
            return False  # handed out again while its launch is still under way here
        task = asyncio.create_task(self._launch(session_id, item))
        self._launches[session_id] = task
        task.add_done_callback(lambda _: self._end(session_id, item.id))
        return True

    async def _launch(self, session_id: str, item: BetaSelfHostedWork) -> None:
        if await self._launcher.launch(item):
            self._fleet.add(session_id)

    def _end(self, session_id: str, work_id: str) -> None:
        self._slots.release()
        _log_if_failed(self._launches.pop(session_id), "launch_failed", session=session_id, work=work_id)


def _log_if_failed(task: asyncio.Task[None], action: str, **names: str) -> None:
    """Tells loudly of what ended `task`: a vendor error that no table maps, or a mistake of ours. It ends no other."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.bug(_log, action, error, **names)
