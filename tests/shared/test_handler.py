"""The host seam: a status for every request, at once, and a wake-up for the right ones only (P6, P7)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterable, AsyncIterator

import pytest

from shared.handler import MAX_BODY_BYTES, Reply, Request, handle
from shared.webhook import Verifier, WebhookEvent
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import FakeProvider, Gate, chunks, event_body, polls, signed_headers, until
from tools.emulator import Emulator
from tools.emulator.webhooks import signing_key

KEY = bytes(range(224, 256))


class Host:
    """A handler with one key, and the events it was woken with."""

    def __init__(self, key: str = "whsec_4OHi4-Tl5ufo6err7O3u7_Dx8vP09fb3-Pn6-_z9_v8") -> None:
        self.verifier = Verifier([key])
        self.woken: list[WebhookEvent] = []

    async def post(self, body: bytes, headers: dict[str, str], method: str = "POST") -> Reply:
        return await self.send(method, headers, chunks(body))

    async def send(self, method: str, headers: dict[str, str], body: AsyncIterable[bytes]) -> Reply:
        return await handle(Request(method, headers, body), verifier=self.verifier, wake=self.woken.append)


@pytest.fixture
def host() -> Host:
    return Host()


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError("the body was read")
    yield b""


async def test_a_webhook_wakes_and_is_answered(host: Host) -> None:
    body = event_body("sesn_7")
    reply = await host.post(body, signed_headers(KEY, body))
    assert (reply.status, json.loads(reply.body)) == (200, {"ok": True})
    assert reply.headers["content-type"] == "application/json"
    assert [event.session_id for event in host.woken] == ["sesn_7"]


async def test_a_repeated_webhook_is_answered_too(host: Host) -> None:
    body = event_body()
    headers = signed_headers(KEY, body)
    assert [(await host.post(body, headers)).status for _ in range(3)] == [200, 200, 200]


async def test_an_idle_session_is_no_work_but_may_be_stranded(host: Host) -> None:
    body = event_body("sesn_7", "session.status_idled")
    suspects: list[WebhookEvent] = []
    request = Request("POST", signed_headers(KEY, body), chunks(body))
    reply = await handle(request, verifier=host.verifier, wake=host.woken.append, suspect=suspects.append)
    assert (reply.status, [event.session_id for event in suspects], host.woken) == (200, ["sesn_7"], [])


@pytest.mark.parametrize("type_", ["session.status_idled", "session.deleted", "session.invented_tomorrow"])
async def test_other_events_are_acknowledged_and_wake_nobody(host: Host, type_: str) -> None:
    body = event_body(type_=type_)
    assert (await host.post(body, signed_headers(KEY, body))).status == 200
    assert host.woken == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "post", "po\u017ft", "", "POST "])
async def test_only_post_is_answered(host: Host, method: str) -> None:
    reply = await host.send(method, signed_headers(KEY, event_body()), unread())
    assert (reply.status, reply.headers["allow"], host.woken) == (405, "POST", [])


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
@pytest.mark.parametrize("value", [None, ""])
async def test_an_unsigned_request_is_refused_before_its_body_is_read(host: Host, name: str, value: str | None) -> None:
    headers = signed_headers(KEY, event_body())
    del headers[name]
    if value is not None:
        headers[name] = value
    assert (await host.send("POST", headers, unread())).status == 401


async def test_a_body_that_says_it_is_too_large_is_not_read(host: Host) -> None:
    headers = signed_headers(KEY, event_body()) | {"content-length": str(MAX_BODY_BYTES + 1)}
    assert (await host.send("POST", headers, unread())).status == 413


@pytest.mark.parametrize("declared", [None, "10", "-1", "", "abc", "9" * 5000, "1e9", "\u00b2"])
async def test_a_body_over_the_cap_is_not_read_to_its_end(host: Host, declared: str | None) -> None:
    headers = signed_headers(KEY, event_body())
    if declared is not None:
        headers["content-length"] = declared
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1024
            yield b"x" * 1024

    assert (await host.send("POST", headers, endless())).status == 413
    assert given <= MAX_BODY_BYTES + 1024


async def test_a_body_of_exactly_the_cap_is_taken(host: Host) -> None:
    body = event_body(padding="")
    body = event_body(padding="x" * (MAX_BODY_BYTES - len(body)))
    assert len(body) == MAX_BODY_BYTES
    assert (await host.post(body, signed_headers(KEY, body))).status == 200
    body = body[:-1] + b" }"
    assert (await host.post(body, signed_headers(KEY, body))).status == 413


async def test_a_body_in_many_pieces_is_one_body(host: Host) -> None:
    body = event_body()
    pieces = [body[at : at + 1] for at in range(len(body))]
    assert (await host.send("POST", signed_headers(KEY, body), chunks(*pieces, b""))).status == 200
    assert len(host.woken) == 1


async def test_a_refusal_says_nothing_of_what_was_sent(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reply = await host.post(b'{"hush": 1}', {**signed_headers(bytes(32), b"{}"), "webhook-id": "hush"})
    assert reply.status == 401
    assert b"hush" not in reply.body
    assert "hush" not in caplog.text


async def test_the_answer_waits_for_nothing_however_deep_the_queue_and_slow_the_provider(
    emulator: Emulator, make_dispatcher: MakeDispatcher
) -> None:
    gate = Gate()  # no launch ends while the webhooks come
    provider = FakeProvider(gate)
    dispatcher = make_dispatcher(provider, settings={"SANDBOX_LAUNCH_CONCURRENCY": "2"})
    sessions = [emulator.create_session() for _ in range(5)]
    verifier = Verifier([emulator.webhook_key])
    key = signing_key(emulator.webhook_key)
    for number, session in enumerate(sessions * 2):
        body = event_body(session)
        headers = signed_headers(key, body, webhook_id=f"whe_{number}")
        request = Request("POST", headers, chunks(body))
        assert (await handle(request, verifier=verifier, wake=dispatcher.wake)).status == 200
        if number == 0:
            assert polls(emulator) == 0  # answered before anything was even asked
    assert {await gate.entered.get(), await gate.entered.get()} == set(sessions[:2])
    gate.opened.set()
    await dispatcher.drain()
    assert provider.started == sessions


async def test_the_emulators_own_webhook_is_accepted(emulator: Emulator) -> None:
    """End to end: what the control plane signs and sends over HTTP, this handler takes."""
    host = Host(emulator.webhook_key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method = (await reader.readline()).split()[0].decode()
        headers: dict[str, str] = {}
        while line := (await reader.readline()).strip().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        reply = await host.send(method, headers, chunks(await reader.readexactly(int(headers["content-length"]))))
        writer.write(f"HTTP/1.1 {reply.status} x\r\ncontent-length: {len(reply.body)}\r\n\r\n".encode() + reply.body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        emulator.set_webhook_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        session = emulator.create_session()
        emulator.say(session, "!true")
        await until(emulator, lambda: len(emulator.deliveries) == 2)  # running, then idle: it waits for its tool
    assert [delivery.status for delivery in emulator.deliveries] == [200, 200]
    assert [event.session_id for event in host.woken] == [session]
