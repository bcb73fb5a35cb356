"""The session store: every write is one step, every claim has an owner and an end."""

from __future__ import annotations

import asyncio

import pytest

from shared.session_store import MemorySessionStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemorySessionStore:
    return MemorySessionStore(clock)


async def test_one_of_many_claims_wins(store: MemorySessionStore) -> None:
    won = await asyncio.gather(*(store.claim("sesn_1", f"owner-{n}", 60) for n in range(20)))
    assert sum(won) == 1
    assert await store.get("sesn_1") == f"owner-{won.index(True)}"


async def test_the_owner_may_claim_again_and_so_prolong(store: MemorySessionStore, clock: Clock) -> None:
    assert await store.claim("key", "me", 60)
    clock.now = 50
    assert await store.claim("key", "me", 60)
    clock.now = 100
    assert await store.get("key") == "me"
    assert not await store.claim("key", "you", 60)


async def test_a_claim_ends(store: MemorySessionStore, clock: Clock) -> None:
    assert await store.claim("key", "me", 60)
    clock.now = 60
    assert await store.get("key") is None
    assert await store.claim("key", "you", 60)


async def test_a_late_owner_cannot_release_what_is_anothers(store: MemorySessionStore, clock: Clock) -> None:
    await store.claim("key", "me", 60)
    clock.now = 61
    await store.claim("key", "you", 60)
    await store.release("key", "me")
    assert await store.get("key") == "you"
    await store.release("key", "you")
    await store.release("key", "you")
    assert await store.get("key") is None


async def test_a_counter_ends_with_its_first_increment(store: MemorySessionStore, clock: Clock) -> None:
    assert [await store.increment("n", 60) for _ in range(3)] == [1, 2, 3]
    clock.now = 59
    assert await store.increment("n", 60) == 4
    clock.now = 60
    assert await store.increment("n", 60) == 1


async def test_keys_do_not_meet(store: MemorySessionStore) -> None:
    await store.claim("a", "me", 60)
    assert await store.claim("b", "you", 60)
    assert await store.get("c") is None
