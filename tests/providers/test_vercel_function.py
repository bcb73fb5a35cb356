"""The function: who may call what, and what an invocation does when it is one of many, frozen, or out of time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.upstash import Upstash, needs_redis
from tests.fakes.vercel import FakeVercel
from tests.providers.vercel_support import VERCEL, make_provider, needs_machines, start_vercel
from tests.shared.support import event_body, signed_headers
from tests.world import RECLAIM_SECONDS
from tools.emulator import Emulator
from tools.emulator.webhooks import signing_key

FUNCTION, MAIN, STORE = (VERCEL.module(name) for name in ("function", "main", "store"))
CRON_SECRET, STATUS_KEY = "a-cron-secret", "a-status-key"
PATIENCE_SECONDS = 60.0


class Instance:
    """One instance of the function, with connections of its own."""

    def __init__(self, emulator: Emulator, fake: FakeVercel, upstash: Upstash | None, **environ: str) -> None:
        settings = VERCEL.shared("settings").Settings.from_env(
            {
                "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
                "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
                "ANTHROPIC_BASE_URL": emulator.url,
                "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
                "SANDBOX_MAX_IDLE_SECONDS": "1",
                **environ,
            }
        )
        # On a busy machine a store that is well may take longer than an invocation should wait for one.
        options = {"call_seconds": PATIENCE_SECONDS}
        store = STORE.open_store(upstash.environ(), settings.environment_id, **options) if upstash else None
        provider = make_provider(fake, settings, store=store)
        verifier = VERCEL.shared("webhook").Verifier(settings.webhook_keys)
        self.host = FUNCTION.Host(settings, provider, store, verifier, CRON_SECRET, STATUS_KEY)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(MAIN.create_app(self.host)), base_url="http://function"
        )

    async def done(self) -> None:
        """Until what was begun is over."""
        while self.host.working:
            await asyncio.wait(set(self.host.working), timeout=PATIENCE_SECONDS)

    async def close(self) -> None:
        for task in set(self.host.working):
            task.cancel()
        await asyncio.gather(*self.host.working, return_exceptions=True)
        await self.http.aclose()
        await self.host.provider.close()

    async def send(self, emulator: Emulator, session: str) -> httpx.Response:
        """The webhook of a session that has work."""
        body = event_body(session_id=session)
        return await self.http.post(
            "/webhook", content=body, headers=signed_headers(signing_key(emulator.webhook_key), body)
        )

    async def cron(self, secret: str = CRON_SECRET) -> httpx.Response:
        return await self.http.get("/cron", headers={"authorization": f"Bearer {secret}"})


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVercel]:
    with start_vercel(tmp_path / "vercel") as fake:
        yield fake
        assert fake.refused == []


@pytest.fixture
def upstash(tmp_path: Path) -> Iterator[Upstash]:
    with Upstash(tmp_path / "redis") as upstash:
        yield upstash


@asynccontextmanager
async def running(*instances: Instance) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await asyncio.gather(*(instance.close() for instance in instances))


async def answer(emulator: Emulator, session: str) -> str:
    await asyncio.to_thread(emulator.wait_idle, session, PATIENCE_SECONDS)
    return str(emulator.events(session, "agent.message")[-1]["content"][0]["text"])


def say(emulator: Emulator, text: str) -> str:
    session: str = emulator.create_session()
    emulator.say(session, text)
    return session


def claims(emulator: Emulator) -> int:
    return sum(
        record.operation == "work.heartbeat"
        and record.status == 200
        and record.query.get("expected_last_heartbeat") == ["NO_HEARTBEAT"]
        for record in emulator.requests
    )


@needs_machines
@needs_redis
class TestManyAtOnce:
    async def test_twenty_invocations_for_one_session_make_one_sandbox(
        self, emulator: Emulator, fake: FakeVercel, upstash: Upstash
    ) -> None:
        session = say(emulator, "!echo served")
        instances = [Instance(emulator, fake, upstash) for _ in range(20)]
        async with running(*instances):
            replies = await asyncio.gather(*(instance.send(emulator, session) for instance in instances))
            assert {reply.status_code for reply in replies} == {200}
            assert await answer(emulator, session) == "served"
            await asyncio.gather(*(instance.done() for instance in instances))
        assert (len(fake.sandboxes), fake.boots, claims(emulator)) == (1, 1, 1)

    async def test_twenty_that_all_have_the_item_make_one_sandbox_with_one_call(
        self, emulator: Emulator, fake: FakeVercel, upstash: Upstash
    ) -> None:
        instances = [Instance(emulator, fake, upstash) for _ in range(20)]
        async with running(*instances):
            sandboxes = await asyncio.gather(*(instance.host.provider.acquire("sesn_1") for instance in instances))
        assert len({sandbox.id for sandbox in sandboxes}) == 1
        assert [sandbox.created for sandbox in sandboxes].count(True) == 1
        assert fake.count("create") == 1  # the store: the others did not even try

    async def test_so_do_they_without_a_store(self, emulator: Emulator, fake: FakeVercel) -> None:
        instances = [Instance(emulator, fake, None) for _ in range(20)]
        async with running(*instances):
            sandboxes = await asyncio.gather(*(instance.host.provider.acquire("sesn_1") for instance in instances))
        assert len({sandbox.id for sandbox in sandboxes}) == 1
        assert [sandbox.created for sandbox in sandboxes].count(True) == 1
        assert fake.boots == 1  # the name: many tried, one was not too late

    async def test_a_signal_that_finds_another_instance_polling_is_not_lost(
        self, emulator: Emulator, fake: FakeVercel, upstash: Upstash
    ) -> None:
        one, other = Instance(emulator, fake, upstash), Instance(emulator, fake, upstash)
        async with running(one, other):
            emulator.fault("work.poll", "delay", 1, seconds=1.0)
            first = say(emulator, "!echo first")
            await one.send(emulator, first)
            await until(lambda: any("drain" in str(command) for command in upstash.commands))
            second = say(emulator, "!echo second")
            await other.send(emulator, second)
            assert await answer(emulator, first) == "first"
            assert await answer(emulator, second) == "second"


@needs_machines
class TestInvocation:
    async def test_the_webhook_is_answered_before_anything_is_made(self, emulator: Emulator, fake: FakeVercel) -> None:
        instance = Instance(emulator, fake, None)
        async with running(instance):
            fake.delays["get"] = 60.0
            began = time.monotonic()
            assert (await instance.send(emulator, say(emulator, "!true"))).json() == {"ok": True}
            assert time.monotonic() - began < fake.delays["get"]
            assert (fake.count("create"), len(instance.host.working)) == (0, 1)

    async def test_the_cron_serves_a_session_whose_webhook_was_lost(self, emulator: Emulator, fake: FakeVercel) -> None:
        instance = Instance(emulator, fake, None)
        async with running(instance):
            session = say(emulator, "!echo found")
            assert (await instance.cron()).status_code == 202
            assert await answer(emulator, session) == "found"

    async def test_a_webhook_sweeps_when_nobody_has_for_a_minute(self, emulator: Emulator, fake: FakeVercel) -> None:
        instance = Instance(emulator, fake, None)
        async with running(instance):
            for expected in (1, 1):
                await instance.send(emulator, "sesn_1")
                await instance.done()
                assert sum(record.operation == "work.list" for record in emulator.requests) == expected

    async def test_a_sweep_stops_what_is_unused_after_everything_that_somebody_waits_for(
        self, emulator: Emulator, fake: FakeVercel
    ) -> None:
        instance = Instance(emulator, fake, None, SANDBOX_KEEP_WARM_SECONDS="100")
        async with running(instance):
            idle = await instance.host.provider.acquire("sesn_idle")
            fake.sandboxes[idle.id].current.started_at -= 250_000
            fake.delays["stop"] = 60.0
            session = say(emulator, "!echo served")
            await instance.send(emulator, session)  # which sweeps, too
            assert await answer(emulator, session) == "served"
            await until(lambda: fake.count("stop"))

    async def test_at_the_deadline_nothing_goes_on_and_the_item_stays_queued(
        self, emulator: Emulator, fake: FakeVercel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        soon = datetime.now(UTC) + timedelta(seconds=FUNCTION.END_SECONDS + 1.0)
        monkeypatch.setattr(FUNCTION, "get_deadline", lambda: soon)  # the platform's, which is not here
        instance = Instance(emulator, fake, None)
        async with running(instance):
            fake.delays["get"] = 60.0
            session = say(emulator, "!echo later")
            await instance.send(emulator, session)
            await instance.done()
            assert datetime.now(UTC) < soon
            assert emulator.work(session)["state"] == "queued"
            assert "the invocation's time is up" in caplog.text
            fake.delays.clear()
            monkeypatch.undo()
            emulator.advance(RECLAIM_SECONDS)
            await instance.cron()
            assert await answer(emulator, session) == "later"

    @needs_redis
    async def test_an_instance_that_was_frozen_with_its_leases_stops_nobody_for_long(
        self, emulator: Emulator, fake: FakeVercel, upstash: Upstash
    ) -> None:
        instance = Instance(emulator, fake, upstash)
        async with running(instance):
            for name in ("drain", "sweep"):
                assert await instance.host.store.claim(name, "frozen", PATIENCE_SECONDS)
            session = say(emulator, "!echo thawed")
            await instance.send(emulator, session)
            await instance.done()
            assert claims(emulator) == 0
            for name in ("drain", "sweep"):
                await ends_in(upstash, emulator, name, 0.001)
            await until_gone(instance.host.store, "sweep")
            making = f"making:{instance.host.provider._name(session)}"
            assert await instance.host.store.claim(making, "frozen", 1.0)
            await instance.cron()
            assert await answer(emulator, session) == "thawed"

    @needs_redis
    async def test_leases_are_kept_while_they_are_used_and_given_back(
        self, emulator: Emulator, fake: FakeVercel, upstash: Upstash, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(STORE, "LEASE_SECONDS", 2 * PATIENCE_SECONDS)
        monkeypatch.setattr(STORE, "RENEW_SECONDS", 0.05)
        one, other = Instance(emulator, fake, upstash), Instance(emulator, fake, upstash)
        async with running(one, other):
            async with STORE.lease(one.host.store, "drain") as is_ours:
                assert is_ours
                await ends_in(upstash, emulator, "drain", PATIENCE_SECONDS)  # as when half of its time is over
                await until_longer_than(upstash, emulator, "drain", PATIENCE_SECONDS)
                async with STORE.lease(other.host.store, "drain") as is_theirs:
                    assert not is_theirs
            async with STORE.lease(other.host.store, "drain") as is_theirs:
                assert is_theirs

    @needs_redis
    async def test_without_an_answer_of_the_store_sessions_are_served(
        self, emulator: Emulator, fake: FakeVercel, upstash: Upstash
    ) -> None:
        upstash.is_down = True
        instance = Instance(emulator, fake, upstash)
        async with running(instance):
            session = say(emulator, "!echo served")
            await instance.send(emulator, session)
            assert await answer(emulator, session) == "served"

    @needs_redis
    async def test_a_sandbox_that_starts_no_runner_is_left_alone_for_a_while(
        self, emulator: Emulator, fake: FakeVercel, upstash: Upstash
    ) -> None:
        instance = Instance(emulator, fake, upstash)
        async with running(instance):
            provider = instance.host.provider
            sandbox = await provider.acquire("sesn_1")
            for _ in range(VERCEL.sandbox.FAILURES):
                await provider.count_failure(sandbox.id)
            with pytest.raises(VERCEL.shared("errors").LaunchFailed, match="left alone") as caught:
                await provider.acquire("sesn_1")
            assert not caught.value.retriable
            assert await provider.acquire("sesn_2")


@needs_machines
class TestCallers:
    async def test_a_stranger_gets_nothing(self, emulator: Emulator, fake: FakeVercel) -> None:
        instance = Instance(emulator, fake, None)
        async with running(instance):
            body = event_body()
            stale = signed_headers(signing_key(emulator.webhook_key), body, age=600)
            wrong = signed_headers(bytes(32), body)
            replies = [await instance.http.post("/webhook", content=body, headers=each) for each in ({}, stale, wrong)]
            replies += [
                await instance.http.get("/webhook"),
                await instance.http.post("/webhook", content=b"x" * 100_000),
            ]
            replies += [
                await instance.cron("guessed"),
                await instance.http.get("/cron"),
                await instance.http.get("/status"),
            ]
            replies += [await instance.http.get(path) for path in ("/", "/docs", "/openapi.json", "/.env")]
            assert {reply.status_code for reply in replies} == {401, 404, 405}
        assert (emulator.requests, fake.requests) == ([], [])

    async def test_without_a_key_there_is_no_status(self, emulator: Emulator, fake: FakeVercel) -> None:
        instance = Instance(emulator, fake, None)
        instance.host.status_key = None
        async with running(instance):
            assert (await instance.http.get("/status", headers={"authorization": "Bearer None"})).status_code == 404

    async def test_the_status_shows_the_queue_and_the_sandboxes(self, emulator: Emulator, fake: FakeVercel) -> None:
        instance = Instance(emulator, fake, None)
        async with running(instance):
            await instance.host.provider.acquire("sesn_1")
            say(emulator, "!true")
            reply = await instance.http.get("/status", headers={"authorization": f"Bearer {STATUS_KEY}"})
            shown = reply.json()
            assert shown["queue"] == {"waiting": 1, "reserved": 0, "oldest": shown["queue"]["oldest"]}
            assert (shown["sandboxes"], shown["store"]) == ({"running": 1, "all": 1}, "none")
            fake.fail("list", 500)
            reply = await instance.http.get("/status", headers={"authorization": f"Bearer {STATUS_KEY}"})
            assert reply.status_code == 502


ENVIRON = {
    "ANTHROPIC_ENVIRONMENT_ID": "env_1",
    "ANTHROPIC_ENVIRONMENT_KEY": "sk-ant-oat01-test",
    "ANTHROPIC_WEBHOOK_SIGNING_KEY": "whsec_" + "A" * 43,
}


class TestStart:
    async def test_what_is_lost_without_a_store_and_a_cron_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        host = MAIN.open_host(ENVIRON)
        await host.provider.close()
        assert "action=no_store" in caplog.text
        assert "action=no_cron" in caplog.text

    async def test_with_both_nothing_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        store = {"KV_REST_API_URL": "https://kv.example", "KV_REST_API_TOKEN": "a-token"}
        host = MAIN.open_host({**ENVIRON, **store, "CRON_SECRET": "one"})
        await host.provider.close()
        assert caplog.text == ""
        assert "a-token" not in repr(host)

    def test_one_secret_for_two_doors_is_refused(self) -> None:
        with pytest.raises(VERCEL.shared("errors").SettingsError, match="CRON_SECRET and STATUS_KEY are the same"):
            MAIN.open_host({**ENVIRON, "CRON_SECRET": "one", "STATUS_KEY": "one"})

    async def test_unusable_settings_are_named_in_the_log_and_every_request_gets_a_503(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MAIN.os, "environ", {"STATUS_KEY": "one"})
        app = MAIN.create_app()
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        try:
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://function") as http:
                    replies = [await http.get(path) for path in ("/webhook", "/cron", "/status", "/healthz")]
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
        assert {reply.status_code for reply in replies} == {503}
        said = capsys.readouterr().err
        assert "ANTHROPIC_ENVIRONMENT_ID is not set" in said
        assert "ANTHROPIC_ENVIRONMENT_KEY is not set" in said


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


async def ends_in(upstash: Upstash, emulator: Emulator, key: str, seconds: float) -> None:
    """As if the rest of its time had passed."""
    name = f"sandboxes:{emulator.environment_id}:{key}"
    assert await upstash._run([["PEXPIRE", name, str(round(seconds * 1000))]]) == [1]


async def until_longer_than(upstash: Upstash, emulator: Emulator, key: str, seconds: float) -> None:
    """Until somebody has renewed it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (await upstash._run([["PTTL", f"sandboxes:{emulator.environment_id}:{key}"]]))[0] <= seconds * 1000:
        assert time.monotonic() < deadline, f"{key} is not renewed"
        await asyncio.sleep(0.01)


async def until_gone(store: Any, key: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while await store.get(key) is not None:
        assert time.monotonic() < deadline, f"{key} does not end"
        await asyncio.sleep(0.05)
