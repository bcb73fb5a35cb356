"""The store: Upstash's real client, its REST interface, and a real redis-server behind it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.upstash import Upstash, needs_redis
from tests.folders import load_folder

STORE = load_folder("vercel").module("store")
PATIENCE_SECONDS = 60.0


def open_store(upstash: Upstash, environment: str = "env_1", **options: Any) -> Any:
    return STORE.open_store(upstash.environ(), environment, **{"call_seconds": PATIENCE_SECONDS, **options})


@pytest.fixture
def upstash(tmp_path: Path) -> Iterator[Upstash]:
    with Upstash(tmp_path / "redis") as upstash:
        yield upstash


@pytest.fixture
async def store(upstash: Upstash) -> AsyncIterator[Any]:
    store = open_store(upstash)
    yield store
    await store.close()


@needs_redis
class TestStore:
    async def test_one_of_twenty_claims_wins_and_its_owner_may_repeat_it(self, store: Any) -> None:
        won = await asyncio.gather(*(store.claim("key", f"owner {number}", 10) for number in range(20)))
        assert won.count(True) == 1
        owner = f"owner {won.index(True)}"
        assert await store.get("key") == owner
        assert await store.claim("key", owner, 10)

    async def test_only_the_owner_releases(self, store: Any) -> None:
        await store.claim("key", "one", 10)
        await store.release("key", "two")
        assert await store.get("key") == "one"
        await store.release("key", "one")
        assert await store.get("key") is None

    async def test_a_claim_ends_by_itself_and_a_repeated_one_lasts_longer(self, store: Any) -> None:
        await store.claim("key", "one", 0.2)
        await store.claim("other", "one", 0.2)
        await store.claim("other", "one", 30)
        await until_gone(store, "key")
        assert not await store.claim("other", "two", 1)

    async def test_a_claim_whose_answer_is_lost_is_ours_at_the_second_try(self, upstash: Upstash, store: Any) -> None:
        upstash.answers_to_lose = 1
        assert await store.claim("key", "one", 10)
        assert [command[0] for command in upstash.commands] == ["EVAL", "EVAL"]

    async def test_a_counter_counts_and_ends(self, upstash: Upstash, store: Any) -> None:
        values = await asyncio.gather(*(store.increment("count", PATIENCE_SECONDS) for _ in range(10)))
        assert sorted(values) == list(range(1, 11))
        await store.increment("short", 0.2)
        await until_gone(store, "short")
        await upstash._run([["PEXPIRE", "sandboxes:env_1:count", "1"]])
        await until_gone(store, "count")
        assert await store.increment("count", 10) == 1

    async def test_environments_do_not_meet(self, upstash: Upstash, store: Any) -> None:
        other = open_store(upstash, "env_2")
        await store.claim("key", "one", 10)
        assert await other.claim("key", "two", 10)
        await other.close()

    async def test_every_key_has_an_end(self, upstash: Upstash, store: Any) -> None:
        await store.claim("key", "one", 10)
        await store.increment("count", 10)
        for key in ("key", "count"):
            (left,) = await upstash._run([["PTTL", f"sandboxes:env_1:{key}"]])
            assert 0 < left <= 10_000


@needs_redis
class TestTrouble:
    async def test_a_store_that_is_down_lets_everybody_go_on(
        self, upstash: Upstash, store: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        upstash.is_down = True
        assert await store.claim("key", "one", 10)
        assert not store.answers
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "the store does not answer" in record.getMessage()
        upstash.is_down = False
        assert (await store.get("key"), await store.increment("count", 10)) == (None, 0)
        await store.release("key", "one")
        assert upstash.commands == []  # it is left alone for a while

    async def test_it_is_asked_again_later(self, upstash: Upstash) -> None:
        now = 0.0
        store = open_store(upstash, clock=lambda: now)
        upstash.is_down = True
        await store.claim("key", "one", 10)
        upstash.is_down = False
        now = STORE.REST_SECONDS + 1
        assert await store.claim("key", "one", 10)
        assert await store.get("key") == "one"
        assert store.answers
        await store.close()

    async def test_a_slow_store_costs_a_bounded_time(self, upstash: Upstash) -> None:
        store = open_store(upstash, call_seconds=0.2)
        upstash.delay_seconds = 60.0
        began = time.monotonic()
        assert await store.claim("key", "one", 10)
        assert time.monotonic() - began < upstash.delay_seconds
        await store.close()

    async def test_a_wrong_token_is_no_crash_and_is_not_shown(
        self, upstash: Upstash, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = STORE.open_store({**upstash.environ(), "UPSTASH_REDIS_REST_TOKEN": "of-somebody-else"}, "env_1")
        assert await store.claim("key", "one", 10)
        assert "UpstashError" in caplog.text
        assert "of-somebody-else" not in caplog.text
        await store.close()

    async def test_an_old_copy_is_over_when_its_time_is(self, upstash: Upstash, store: Any) -> None:
        await store.claim("key", "an instance of long ago", 0.5)
        copy = upstash.redis.copy()
        await store.release("key", "an instance of long ago")
        upstash.redis.restore(copy)
        await until_gone(store, "key")
        assert await store.claim("key", "one", 10)


async def until_gone(store: Any, key: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while await store.get(key) is not None:
        assert time.monotonic() < deadline, f"{key} does not end"
        await asyncio.sleep(0.02)


def test_no_store_is_none() -> None:
    assert STORE.open_store({}, "env_1") is None


def test_the_marketplaces_names_are_read() -> None:
    environ = {"KV_REST_API_URL": "https://kv.example", "KV_REST_API_TOKEN": "a-token"}
    assert STORE.open_store(environ, "env_1") is not None


@pytest.mark.parametrize("name", ["UPSTASH_REDIS_REST_URL", "KV_REST_API_URL"])
def test_half_a_store_is_refused_by_name(name: str) -> None:
    with pytest.raises(Exception, match=f"only one of {name} and") as caught:
        STORE.open_store({name: "https://kv.example"}, "env_1")
    assert type(caught.value).__name__ == "SettingsError"
