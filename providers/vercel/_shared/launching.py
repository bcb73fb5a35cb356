"""One reserved item becomes a runner in its session's sandbox, or stays in the queue (R7). Nothing is acked here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import anthropic
from anthropic import AsyncAnthropic
from anthropic.types.beta.environments import BetaSelfHostedWork

from . import log
from .errors import JobRefused, LaunchFailed
from .jobs import Job
from .provider import Launch, Provider
from .settings import Settings
from .staging import Stager

LAUNCH_SECONDS = 90.0  # from hand-out; below the reclaim window, so that an item is never launched twice at once
RETRY_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # between two attempts of a poll or a launch; the last one repeats
_HEALTHCHECKS = ("healthcheck", "health_check")

_log = logging.getLogger(__name__)


def pause_after(attempt: int, pauses: Sequence[float]) -> float:
    """Seconds before the attempt that follows `attempt`, counted from 1."""
    return pauses[min(attempt, len(pauses)) - 1]


class Launcher:
    """Launches items, each in its own task."""

    def __init__(
        self,
        client: AsyncAnthropic,
        settings: Settings,
        provider: Provider,
        *,
        launch_seconds: float = LAUNCH_SECONDS,
        retry_pauses: Sequence[float] = RETRY_PAUSES,
    ) -> None:
        self._client = client
        self._settings = settings
        self._provider = provider
        self._launch_seconds = launch_seconds
        self._retry_pauses = retry_pauses
        self._stager = Stager(client) if settings.stage_files else None

    async def launch(self, item: BetaSelfHostedWork) -> bool:
        """True when a runner serves the session now: this one, or one that was there. Never raises for a launch that
        fails; what no table maps is a bug and propagates."""
        began = time.monotonic()
        kind = getattr(item.data, "type", None)
        if kind in _HEALTHCHECKS:
            await self._stop_healthcheck(item)
            return False
        try:
            if kind != "session":
                raise JobRefused("the item is no session")
            job = Job.from_item(item, self._settings)
        except JobRefused as error:
            _log.error(log.line("refused", work=item.id, reason=error.args[0]))
            return False
        try:
            async with asyncio.timeout(self._launch_seconds) as budget:
                return await self._launch_until_started(job, began)
        except TimeoutError:
            if not budget.expired():
                raise  # the provider's own, which it should have mapped
            self._log_failure(job, began, "no runner was ready in time")
            return False

    async def _launch_until_started(self, job: Job, began: float) -> bool:
        staging = asyncio.create_task(self._stager.files(job)) if self._stager is not None else None
        try:
            return await self._retry_until_started(job, staging, began)
        finally:
            if staging is not None:
                staging.cancel()

    async def _retry_until_started(
        self, job: Job, staging: asyncio.Task[dict[str, bytes]] | None, began: float
    ) -> bool:
        attempt = 0
        while True:
            attempt += 1
            try:
                sandbox = await self._provider.acquire(job.session_id)
                files = await staging if staging is not None else {}
                started = await sandbox.start(Launch(stdin=job.to_stdin(), files=files))
            except LaunchFailed as error:
                self._log_failure(job, began, error.args[0], attempt=attempt)
                if not error.retriable:
                    return False
            else:
                outcome = "launched" if started.outcome == "ready" else "served_already"
                _log.info(log.line(outcome, **self._names(job), sandbox=sandbox.id, attempt=attempt, ms=log.ms(began)))
                return True
            await asyncio.sleep(pause_after(attempt, self._retry_pauses))

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
        _log.warning(log.line("launch_failed", **self._names(job), attempt=attempt, ms=log.ms(began), reason=reason))

    def _names(self, job: Job) -> dict[str, str]:
        return {"provider": self._provider.name, "session": job.session_id, "work": job.work_id}
