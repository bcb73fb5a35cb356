"""From the queue to running sandboxes: reserve, launch, and never ack (P2, R7, R8).

The item stays un-acked until a loaded runner acks it inside the sandbox, so a launch that fails anywhere loses nothing:
the queue offers the item again by itself once RECLAIM_SECONDS have passed. That is also why no foreign poller may share
the environment: one with a shorter reclaim window would be handed items that are being launched here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence

import anthropic
from anthropic import AsyncAnthropic
from anthropic.types.beta.environments import BetaSelfHostedWork

from . import log
from .errors import JobRefused, LaunchFailed
from .healing import Healer
from .jobs import Job
from .provider import Launch, Provider, SandboxInfo
from .settings import Settings

RECLAIM_SECONDS = 120.0
LAUNCH_SECONDS = 90.0  # from hand-out; below RECLAIM_SECONDS, so that an item is never launched twice at once
DRAIN_SECONDS = 240.0  # one drain polls no longer than this; the next signal or sweep goes on
CALL_SECONDS = 30.0  # for one call of a provider that is no launch: a list, a renewal, a release
POLL_ATTEMPTS = 3
RETRY_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # between two attempts of a poll or a launch; the last one repeats
LIVE_REFRESH_SECONDS = 15.0  # how long a count of running sandboxes is trusted
RENEW_SECONDS = 300.0  # what a sweep asks for while a runner works; several sweeps' worth
RELEASES_PER_SWEEP = 100
_HEALTHCHECKS = ("healthcheck", "health_check")

_log = logging.getLogger(__name__)


def open_client(settings: Settings) -> AsyncAnthropic:
    """The host's client: it holds the environment key and talks to nothing but the queue and its sessions."""
    return AsyncAnthropic(auth_token=settings.environment_key, base_url=settings.base_url, max_retries=2, timeout=30.0)


class Dispatcher:
    """One host process's share of an environment."""

    def __init__(
        self,
        *,
        client: AsyncAnthropic,
        settings: Settings,
        provider: Provider,
        launch_seconds: float = LAUNCH_SECONDS,
        call_seconds: float = CALL_SECONDS,
        retry_pauses: Sequence[float] = RETRY_PAUSES,
    ) -> None:
        self._client = client
        self._settings = settings
        self._provider = provider
        self._healer = Healer(client, settings)
        self._worker_id = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"  # one a process, as the API documents it
        self._launch_seconds = launch_seconds
        self._call_seconds = call_seconds
        self._retry_pauses = retry_pauses
        self._slots = asyncio.Semaphore(settings.launch_concurrency)
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None
        self._launches: dict[str, asyncio.Task[None]] = {}  # by session: one at a time for each
        self._live: set[str] = set()  # sessions whose sandbox runs, as last listed, and those launched since
        self._listed_at = float("-inf")
        self._is_full = False
        self._closing = False

    def wake(self, _event: object = None) -> None:
        """Says that there may be work, and returns at once. A signal during a drain makes it poll once more."""
        if self._closing:
            return
        self._signalled = True
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
            self._draining.add_done_callback(lambda task: _log_if_failed(task, "drain"))

    async def drain(self) -> None:
        """Polls until the queue is empty and waits for the launches that came of it."""
        self.wake()
        if (draining := self._draining) is not None:
            await asyncio.wait([draining])
            if not draining.cancelled():
                draining.result()
        if self._launches:
            await asyncio.wait(list(self._launches.values()))

    async def sweep(self) -> None:
        """What must happen even when no webhook ever arrives (P1): drain, heal, renew, clean up. Run it each minute."""
        began = time.monotonic()
        await self.drain()
        items, sandboxes = await self._healer.list_work(), await self._list_sandboxes()
        if items is not None:
            await self._renew(items, sandboxes or [])
            if await self._healer.heal(items):
                await self.drain()
            await self._clean_up(items, sandboxes or [])
        _log.info(log.line("sweep", provider=self._provider.name, ms=_ms(began)))

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
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._signalled and time.monotonic() < deadline:
            if not await self._room():
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
                await asyncio.sleep(self._pause_after(attempt - 1))
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
            except (anthropic.APIError, json.JSONDecodeError) as error:
                _log.warning(log.line("poll", attempt=attempt, error=error))
            else:
                # The SDK checks no shapes: `{}` comes as an item without an id, a proxy's page as its text.
                return item if isinstance(item, BetaSelfHostedWork) and item.id else None
        return None

    async def _room(self) -> bool:
        """Whether one more sandbox may run (SANDBOX_MAX_LIVE). No, too, when the provider does not say."""
        if time.monotonic() - self._listed_at > LIVE_REFRESH_SECONDS and await self._list_sandboxes() is None:
            return False
        live = len(self._live | self._launches.keys())
        was_full, self._is_full = self._is_full, live >= self._settings.max_live
        if self._is_full and not was_full:
            reason = f"{live} sandboxes run and SANDBOX_MAX_LIVE is {self._settings.max_live}; work waits in the queue"
            _log.warning(log.line("full", provider=self._provider.name, reason=reason))
        return not self._is_full

    def _begin(self, item: BetaSelfHostedWork) -> bool:
        """Starts the launch of a reserved item. The slot is the launch's from here on."""
        session_id = str(getattr(item.data, "id", None) or item.id)
        if session_id in self._launches:
            return False  # handed out again while its launch is still under way here
        task = asyncio.create_task(self._launch(item))
        self._launches[session_id] = task
        task.add_done_callback(lambda _: self._end(session_id, item.id))
        return True

    def _end(self, session_id: str, work_id: str) -> None:
        self._slots.release()
        _log_if_failed(self._launches.pop(session_id), "launch_failed", session=session_id, work=work_id)

    def _pause_after(self, attempt: int) -> float:
        return self._retry_pauses[min(attempt, len(self._retry_pauses)) - 1]

    # --- launch ------------------------------------------------------------------------------------------------------

    async def _launch(self, item: BetaSelfHostedWork) -> None:
        began = time.monotonic()
        kind = getattr(item.data, "type", None)
        if kind in _HEALTHCHECKS:
            await self._stop_healthcheck(item)
            return
        try:
            if kind != "session":
                raise JobRefused("the item is no session")
            job = Job.from_item(item, self._settings)
        except JobRefused as error:
            _log.error(log.line("refused", work=item.id, reason=error.args[0]))
            return
        try:
            async with asyncio.timeout(self._launch_seconds) as budget:
                await self._launch_until_started(job, began)
        except TimeoutError:
            if not budget.expired():
                raise  # the provider's own, which it should have mapped
            self._log_failure(job, began, "no runner was ready in time; the item stays queued")

    async def _launch_until_started(self, job: Job, began: float) -> None:
        launch = Launch(stdin=job.to_stdin())
        attempt = 0
        while True:
            attempt += 1
            try:
                sandbox = await self._provider.acquire(job.session_id)
                started = await sandbox.start(launch)
            except LaunchFailed as error:
                self._log_failure(job, began, error.args[0], attempt=attempt)
                if not error.retriable:
                    return
            else:
                self._live.add(job.session_id)
                outcome = "launched" if started.outcome == "ready" else "served_already"
                _log.info(log.line(outcome, **self._names(job), sandbox=sandbox.id, attempt=attempt, ms=_ms(began)))
                return
            await asyncio.sleep(self._pause_after(attempt))

    async def _stop_healthcheck(self, item: BetaSelfHostedWork) -> None:
        """The queue also sends items to see that a worker answers. The SDK's worker stops them too."""
        work = self._client.beta.environments.work
        try:
            await work.ack(item.id, environment_id=self._settings.environment_id)
            await work.stop(item.id, environment_id=self._settings.environment_id, force=True)
        except anthropic.APIError as error:
            _log.warning(log.line("healthcheck", work=item.id, error=error))
        else:
            _log.info(log.line("healthcheck", work=item.id))

    def _log_failure(self, job: Job, began: float, reason: str, attempt: int | None = None) -> None:
        _log.warning(log.line("launch_failed", **self._names(job), attempt=attempt, ms=_ms(began), reason=reason))

    def _names(self, job: Job) -> dict[str, str]:
        return {"provider": self._provider.name, "session": job.session_id, "work": job.work_id}

    # --- sweep -------------------------------------------------------------------------------------------------------

    async def _list_sandboxes(self) -> list[SandboxInfo] | None:
        """What the provider has. None when it does not say; the next sweep asks again."""
        try:
            async with asyncio.timeout(self._call_seconds):
                infos = [info async for info in self._provider.sandboxes()]
        except (LaunchFailed, TimeoutError) as error:
            _log.warning(log.line("list", provider=self._provider.name, error=error, reason=_reason(error)))
            return None
        self._live = {info.session_id for info in infos if info.running}
        self._listed_at = time.monotonic()
        return infos

    async def _renew(self, items: list[BetaSelfHostedWork], sandboxes: list[SandboxInfo]) -> None:
        """Keeps the sandboxes of working runners alive. `acquire` is not used: it would make what is gone."""
        serving = {item.data.id for item in items if item.state == "active"}
        working = [info for info in sandboxes if info.running and info.session_id in serving]
        await _all(self._seam("renew", info, self._provider.renew, RENEW_SECONDS) for info in working)

    async def _clean_up(self, items: list[BetaSelfHostedWork], sandboxes: list[SandboxInfo]) -> None:
        """Deletes what nobody has used for SANDBOX_RETENTION_SECONDS, and nobody is about to."""
        oldest = time.time() - self._settings.retention_seconds
        wanted = {item.data.id for item in items if item.state != "stopped"} | self._live | self._launches.keys()
        stale = [info for info in sandboxes if not info.running and info.last_used_at < oldest]
        unwanted = [info for info in stale if info.session_id not in wanted][:RELEASES_PER_SWEEP]
        await _all(self._release(info) for info in unwanted)

    async def _release(self, info: SandboxInfo) -> None:
        if await self._seam("release", info, self._provider.release):
            _log.info(log.line("released", session=info.session_id, sandbox=info.sandbox_id))

    async def _seam(
        self, action: str, info: SandboxInfo, call: Callable[..., Awaitable[None]], *arguments: float
    ) -> bool:
        """One sandbox's trouble is not the sweep's."""
        try:
            async with asyncio.timeout(self._call_seconds):
                await call(info.sandbox_id, *arguments)
        except (LaunchFailed, TimeoutError) as error:
            names = {"provider": self._provider.name, "session": info.session_id, "sandbox": info.sandbox_id}
            _log.warning(log.line(action, **names, error=error, reason=_reason(error)))
            return False
        return True


async def _all(calls: Iterable[Awaitable[object]]) -> None:
    """All of them, whatever becomes of one."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, Exception):
            _log_bug("sweep", outcome)


def _log_if_failed(task: asyncio.Task[None], action: str, **names: str) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log_bug(action, error, **names)


def _log_bug(action: str, error: BaseException, **names: str) -> None:
    """A vendor error that no table maps, or a mistake of ours: loudly, and it ends nothing but its own task."""
    _log.error(log.line(action, **names, error=error), exc_info=error)


def _reason(error: LaunchFailed | TimeoutError) -> str:
    return str(error) if isinstance(error, LaunchFailed) else "no answer in time"


def _ms(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
