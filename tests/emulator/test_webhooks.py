"""Webhooks against a real receiver: signature, retries on the emulator's clock, the redirect that disables."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from anthropic import Anthropic

from tests.emulator.support import result
from tools.emulator import Delivery, Emulator
from tools.emulator.webhooks import REDIRECTED, delay_after, signature, signing_key

URL_SAFE_KEY = "whsec_" + base64.urlsafe_b64encode(b"\xfb\xff" * 16).decode().rstrip("=")


@dataclass
class Receiver:
    """An HTTP server that answers what it is told and keeps what it got."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], str]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    held: set[str] = field(default_factory=set)
    """Sessions whose deliveries wait for the gate."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if any(session_id in body for session_id in receiver.held):
                receiver.gate.wait(60)
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
            self.send_header("content-length", "0")
            self.send_header("location", "http://127.0.0.1:1/")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/webhook"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield receiver
    receiver.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def emulator(receiver: Receiver) -> Iterator[Emulator]:
    with Emulator(webhook_url=receiver.url, webhook_types=["session.status_run_started"]) as emulator:
        yield emulator


def delivered(emulator: Emulator, count: int) -> list[Delivery]:
    emulator.wait_until(lambda: len(emulator.deliveries) >= count)
    return emulator.deliveries


@pytest.mark.parametrize("key", [None, URL_SAFE_KEY])
def test_the_sdk_unwraps_a_delivery(receiver: Receiver, key: str | None) -> None:
    with Emulator(webhook_url=receiver.url, webhook_key=key) as emulator:
        session_id = emulator.create_session()
        emulator.say(session_id, "hello")
        delivered(emulator, 2)
        verifier = emulator.webhook_key if key is None else "whsec_" + base64.b64encode(signing_key(key)).decode()
        running = emulator.events(session_id, "session.status_running")[0]
    client = Anthropic(api_key="unused")
    events = {}
    for headers, body in receiver.got:
        event = client.beta.webhooks.unwrap(body, headers=headers, key=verifier)
        assert event.id == headers["webhook-id"]
        assert event.id.startswith("whe_")
        assert event.data.id == session_id
        events[event.data.type] = event
    client.close()
    assert set(events) == {"session.status_run_started", "session.status_idled"}
    created_at = events["session.status_run_started"].created_at
    assert abs(created_at.timestamp() - _seconds(running["processed_at"])) < 0.001


def _seconds(timestamp: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(timestamp).timestamp()


def test_every_transition_to_running_is_told(emulator: Emulator, receiver: Receiver) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0]))
    deliveries = delivered(emulator, 2)
    assert [(one.type, one.session_id, one.attempt, one.status) for one in deliveries] == [
        ("session.status_run_started", session_id, 1, 204)
    ] * 2
    assert deliveries[0].webhook_id != deliveries[1].webhook_id


def test_three_attempts_and_no_more(emulator: Emulator, receiver: Receiver) -> None:
    receiver.statuses = [500, 503, 500, 500]
    emulator.say(emulator.create_session(), "hello")
    for attempts in (1, 2):
        delivered(emulator, attempts)
        emulator.advance(1)  # and it goes on by itself meanwhile; not before five
        assert len(emulator.deliveries) == attempts
        emulator.advance(120)
    delivered(emulator, 3)
    emulator.advance(3600)
    emulator.say(emulator.create_session(), "another")  # a later delivery shows that the first has been given up
    delivered(emulator, 4)

    ids = [headers["webhook-id"] for headers, _ in receiver.got]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert receiver.got[0][1] == receiver.got[1][1]
    assert [one.status for one in emulator.deliveries] == [500, 503, 500, 500]
    assert [one.attempt for one in emulator.deliveries] == [1, 2, 3, 1]
    assert emulator.deliveries[1].at - emulator.deliveries[0].at >= timedelta(seconds=5)


def test_a_retry_is_signed_anew(emulator: Emulator, receiver: Receiver) -> None:
    receiver.statuses = [500]
    emulator._webhooks.wall_time = iter([1000.0, 2000.0]).__next__
    emulator.say(emulator.create_session(), "hello")
    delivered(emulator, 1)
    emulator.advance(120)
    delivered(emulator, 2)
    key = signing_key(emulator.webhook_key)
    for (headers, body), timestamp in zip(receiver.got, (1000, 2000), strict=True):
        assert headers["webhook-timestamp"] == str(timestamp)
        assert headers["webhook-signature"] == signature(key, headers["webhook-id"], timestamp, body)


def test_a_redirect_disables_the_endpoint(emulator: Emulator, receiver: Receiver) -> None:
    receiver.statuses = [302]
    session_id = emulator.create_session()
    emulator.say(session_id, "hello")
    delivered(emulator, 1)
    emulator.wait_until(lambda: emulator.webhook_disabled_reason)
    assert emulator.webhook_disabled_reason == REDIRECTED
    emulator.advance(3600)
    emulator.say(session_id, "unheard")
    emulator.set_webhook_url(receiver.url)
    emulator.say(session_id, "heard")
    delivered(emulator, 2)
    assert [one.status for one in emulator.deliveries] == [302, 204]


def test_a_slow_receiver_delays_no_other_delivery(emulator: Emulator, receiver: Receiver) -> None:
    slow, quick = emulator.create_session(), emulator.create_session()
    receiver.held = {slow}
    emulator.say(slow, "hello")
    emulator.say(quick, "hello")
    assert [one.session_id for one in delivered(emulator, 1)] == [quick]
    receiver.gate.set()
    assert [one.session_id for one in delivered(emulator, 2)] == [quick, slow]


def test_a_receiver_that_does_not_answer_in_time(receiver: Receiver) -> None:
    with Emulator(webhook_url=receiver.url, webhook_timeout=0.1) as emulator:
        session_id = emulator.create_session()
        receiver.held = {session_id}
        emulator.say(session_id, "hello")
        delivery = delivered(emulator, 1)[0]
    assert delivery.status is None
    assert delivery.error in ("ConnectTimeout", "ReadTimeout")  # a busy machine may need that long to connect


def test_nobody_listening_is_an_error_too(emulator: Emulator) -> None:
    emulator.set_webhook_url("http://127.0.0.1:9/")
    emulator.say(emulator.create_session(), "hello")
    assert delivered(emulator, 1)[0].error == "ConnectError"


def test_paused_webhooks_are_lost(emulator: Emulator, receiver: Receiver) -> None:
    lost, heard = emulator.create_session(), emulator.create_session()
    emulator.webhooks_paused = True
    emulator.say(lost, "hello")
    emulator.webhooks_paused = False
    emulator.say(heard, "hello")
    assert [one.session_id for one in delivered(emulator, 1)] == [heard]


def test_the_backoff_grows_and_stays_in_its_bounds() -> None:
    first, second = [delay_after(1) for _ in range(200)], [delay_after(2) for _ in range(200)]
    assert 5 <= min(first) < max(first) <= 10
    assert 20 <= min(second) < max(second) <= 40


@pytest.mark.parametrize("url", ["ftp://host/", "example.com", "http://", "http://host:99999999/"])
def test_a_url_that_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        Emulator(webhook_url=url)


@pytest.mark.parametrize("key", ["secret", "whsec_", "whsec_!!!!"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"whsec_|base64|[Nn]on-base64"):
        Emulator(webhook_key=key)
