"""The store: Upstash Redis over REST, as Vercel's marketplace attaches it ("KV").

Nothing here decides whether a session is served twice: sandbox names, the queue and the runner's claim do. The store
keeps instances from doing the same work at once, and counts failures. So it fails open: when it does not answer within
a moment, instances go on as without it, and say so. What an old copy of it says ends by itself (every key has a time).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import httpx
from upstash_redis.asyncio import Redis
from upstash_redis.errors import UpstashError

from _shared.errors import SettingsError
from _shared.log import line
from _shared.session_store import SessionStore
from _shared.settings import credential, load, setting, url

_log = logging.getLogger(__name__)

T = TypeVar("T")

CALL_SECONDS = 2.0
RETRY_SECONDS = 0.2  # the client tries a call twice; both fit into CALL_SECONDS when the store is well
REST_SECONDS = 30.0  # how long a store that did not answer is left alone
LEASE_SECONDS = 15.0  # how long others wait for an instance that was frozen
RENEW_SECONDS = 5.0

# One step each, and the same when the client sends it twice: the owner is compared with what is there.
_CLAIM = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_INCREMENT = """
local value = redis.call('INCR', KEYS[1])
if value == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return value
"""


@dataclass(frozen=True)
class StoreSettings:
    """Where the store is. Vercel's marketplace sets one of the two pairs."""

    upstash_url: str | None = setting(
        "UPSTASH_REDIS_REST_URL",
        "The REST address of an Upstash Redis. Without a store, see Limits.",
        parse=url,
        default=None,
    )
    upstash_token: str | None = setting(
        "UPSTASH_REDIS_REST_TOKEN", "Its token.", parse=credential, default=None, secret=True
    )
    kv_url: str | None = setting(
        "KV_REST_API_URL",
        "The same as `UPSTASH_REDIS_REST_URL`, under the marketplace's other name.",
        parse=url,
        default=None,
    )
    kv_token: str | None = setting(
        "KV_REST_API_TOKEN", "The same as `UPSTASH_REDIS_REST_TOKEN`.", parse=credential, default=None, secret=True
    )


def open_store(environ: Mapping[str, str], environment_id: str, **options: Any) -> UpstashSessionStore | None:
    """The store that the environment describes, or None where it describes none; `options` are its constructor's.
    Raises `SettingsError` for half of one. Opens no connection."""
    own = load(StoreSettings, environ)
    for names, at, token in (
        ("UPSTASH_REDIS_REST_URL and UPSTASH_REDIS_REST_TOKEN", own.upstash_url, own.upstash_token),
        ("KV_REST_API_URL and KV_REST_API_TOKEN", own.kv_url, own.kv_token),
    ):
        if at and token:
            redis = Redis(at, token, rest_retries=1, rest_retry_interval=RETRY_SECONDS, allow_telemetry=False)
            return UpstashSessionStore(redis, f"sandboxes:{environment_id}:", **options)
        if at or token:
            raise SettingsError(f"only one of {names} is set: set both, or attach the store to the project again")
    return None


class UpstashSessionStore:
    """A `SessionStore` whose calls end within CALL_SECONDS and never fail."""

    def __init__(
        self,
        redis: Redis,
        prefix: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        self._redis = redis
        self._prefix = prefix
        self._clock = clock
        self._call_seconds = call_seconds
        self._rests_until = float("-inf")

    @property
    def answers(self) -> bool:
        """Whether the last call was answered."""
        return self._rests_until == float("-inf")

    async def get(self, key: str) -> str | None:
        return await self._ask(lambda: self._redis.get(self._prefix + key), None)

    async def claim(self, key: str, owner: str, ttl_seconds: float) -> bool:
        """True, too, when the store does not answer."""
        return bool(await self._eval(_CLAIM, key, owner, str(_ms(ttl_seconds)), otherwise=1))

    async def release(self, key: str, owner: str) -> None:
        await self._eval(_RELEASE, key, owner, otherwise=0)

    async def increment(self, key: str, ttl_seconds: float) -> int:
        """The client may send it twice, so the value is at least the number of calls; 0 when the store does not
        answer."""
        return await self._eval(_INCREMENT, key, str(_ms(ttl_seconds)), otherwise=0)

    async def close(self) -> None:
        await self._redis.close()

    async def _eval(self, script: str, key: str, *arguments: str, otherwise: int) -> int:
        return await self._ask(
            lambda: self._redis.eval(script, keys=[self._prefix + key], args=list(arguments)), otherwise
        )

    async def _ask(self, call: Callable[[], Awaitable[T]], otherwise: T) -> T:
        if self._clock() < self._rests_until:
            return otherwise
        try:
            async with asyncio.timeout(self._call_seconds):
                answer = await call()
        # Its errors, the network's, and what its client makes of a page that is no answer of a store.
        except (UpstashError, httpx.HTTPError, TimeoutError, ValueError, KeyError, AttributeError, TypeError) as error:
            self._rests_until = self._clock() + REST_SECONDS
            reason = f"the store does not answer; for {REST_SECONDS:g} s this instance goes on without it"
            _log.warning(line("store", error=error, reason=reason))
            return otherwise
        self._rests_until = float("-inf")
        return answer


@contextlib.asynccontextmanager
async def lease(store: SessionStore | None, key: str) -> AsyncIterator[bool]:
    """Whether this instance has the lease of `key`; while it has, it renews it. Without a store everybody has it."""
    owner = uuid4().hex
    if store is None or not await store.claim(key, owner, LEASE_SECONDS):
        yield store is None
        return

    async def renew() -> None:
        while await store.claim(key, owner, LEASE_SECONDS):  # noqa: ASYNC110 - until it is cancelled
            await asyncio.sleep(RENEW_SECONDS)

    renewing = asyncio.create_task(renew())
    try:
        yield True
    finally:
        renewing.cancel()
        await asyncio.wait([renewing])
        await store.release(key, owner)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
