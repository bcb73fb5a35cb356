"""The environment's sandboxes, as its provider lists them: how many run, which to keep alive, which to delete."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from anthropic.types.beta.environments import BetaSelfHostedWork

from . import log
from .errors import LaunchFailed
from .provider import Provider, SandboxInfo, Tidies
from .settings import Settings

CALL_SECONDS = 30.0  # for one call of a provider that is no launch: a list, a renewal, a release
LIVE_REFRESH_SECONDS = 15.0  # how long a count of running sandboxes is trusted
RENEW_SECONDS = 300.0  # what a sweep asks for while a runner works; several sweeps' worth
RELEASES_PER_SWEEP = 100
REPEAT_SECONDS = 60.0  # a poller asks for room each second or two: a list that fails and fails is told of once a minute

_log = logging.getLogger(__name__)


class Fleet:
    """What one dispatcher knows of them."""

    def __init__(
        self,
        provider: Provider,
        settings: Settings,
        *,
        call_seconds: float = CALL_SECONDS,
        repeat_seconds: float = REPEAT_SECONDS,
    ) -> None:
        self._provider = provider
        self._settings = settings
        self._call_seconds = call_seconds
        self._repeat_seconds = repeat_seconds
        self._told = ("", float("-inf"))  # why the last list failed, and when that was logged
        self._live: set[str] = set()  # sessions whose sandbox runs, as last listed, and those launched since
        self._listed_at = float("-inf")
        self._is_full = False

    def add(self, session_id: str) -> None:
        """The session's sandbox was launched since the last list."""
        self._live.add(session_id)

    async def has_room(self, launching: Collection[str]) -> bool:
        """Whether one more sandbox may run (SANDBOX_MAX_LIVE). No, too, when the provider does not say."""
        if time.monotonic() - self._listed_at > LIVE_REFRESH_SECONDS and await self.list() is None:
            return False
        live = len(self._live.union(launching))
        was_full, self._is_full = self._is_full, live >= self._settings.max_live
        if self._is_full and not was_full:
            reason = f"{live} sandboxes run and SANDBOX_MAX_LIVE is {self._settings.max_live}; work waits in the queue"
            _log.warning(log.line("full", provider=self._provider.name, reason=reason))
        return not self._is_full

    async def list(self) -> list[SandboxInfo] | None:
        """What the provider has. None when it does not say; the next sweep asks again."""
        try:
            async with asyncio.timeout(self._call_seconds):
                infos = [info async for info in self._provider.sandboxes()]
        except (LaunchFailed, TimeoutError) as error:
            self._tell(log.line("list", provider=self._provider.name, error=error, reason=_reason(error)))
            return None
        self._told = ("", float("-inf"))
        self._live = {info.session_id for info in infos if info.running}
        self._listed_at = time.monotonic()
        return infos

    def _tell(self, trouble: str) -> None:
        """Something else at once, the same again after a while."""
        was, told_at = self._told
        if trouble != was or time.monotonic() - told_at >= self._repeat_seconds:
            self._told = (trouble, time.monotonic())
            _log.warning(trouble)

    async def renew(self, items: Iterable[BetaSelfHostedWork] | None, sandboxes: Iterable[SandboxInfo]) -> None:
        """Keeps the sandboxes of working runners alive; all that run, when the API does not say (None) who works.
        `acquire` is not used: it would make what is gone."""
        serving = None if items is None else {item.data.id for item in items if item.state == "active"}
        working = [info for info in sandboxes if info.running and (serving is None or info.session_id in serving)]
        await _all(self._seam("renew", info, self._provider.renew, RENEW_SECONDS) for info in working)

    async def clean_up(
        self, items: Iterable[BetaSelfHostedWork], sandboxes: Sequence[SandboxInfo], launching: Collection[str]
    ) -> None:
        """Deletes what nobody has used for SANDBOX_RETENTION_SECONDS, and nobody is about to."""
        oldest = time.time() - self._settings.retention_seconds
        wanted = {item.data.id for item in items if item.state != "stopped"} | self._live | set(launching)
        stale = [info for info in sandboxes if not info.running and info.last_used_at < oldest]
        unwanted = [info for info in stale if info.session_id not in wanted][:RELEASES_PER_SWEEP]
        await _all(self._release(info) for info in unwanted)

    async def tidy(self) -> None:
        """Lets the provider do what it wants to do in each sweep."""
        if not isinstance(self._provider, Tidies):
            return
        try:
            async with asyncio.timeout(self._call_seconds):
                await self._provider.tidy()
        except (LaunchFailed, TimeoutError) as error:
            _log.warning(log.line("tidy", provider=self._provider.name, error=error, reason=_reason(error)))

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
            log.bug(_log, "sweep", outcome)


def _reason(error: LaunchFailed | TimeoutError) -> str:
    return str(error) if isinstance(error, LaunchFailed) else "no answer in time"
