"""Faults on the way: what the emulator has recorded, what the client sees, and that nothing else is touched."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anthropic import APIConnectionError, APIStatusError, AsyncAnthropic, RateLimitError

from tests.emulator.support import at, bearer, claim, client_of, result, serving, work_path, worker_for
from tools.emulator import Emulator, streams
from tools.emulator.faults import Fault

BETA = {"anthropic-beta": "managed-agents-2026-04-01"}


@pytest.fixture
def client(emulator: Emulator) -> Iterator[httpx2.Client]:
    """The environment key on plain requests."""
    headers = bearer(emulator.environment_key) | BETA
    with httpx2.Client(base_url=emulator.url, headers=headers) as client:
        yield client


def stop(emulator: Emulator, client: httpx2.Client, session_id: str) -> httpx2.Response:
    return client.post(work_path(emulator, f"/{session_id}/stop"), json={"force": True})


def in_thread(function: Callable[[], httpx2.Response]) -> tuple[threading.Thread, list[httpx2.Response]]:
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    return thread, answers


# Requests


def test_a_lost_response_was_recorded(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    fault = emulator.fault("work.stop", "lose_response")
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
        stop(emulator, client, session_id)
    assert emulator.work(session_id)["state"] == "stopped"
    assert (fault.hits, emulator.faults()) == (1, [])
    assert (emulator.requests[-1].status, emulator.requests[-1].fault) == (200, "lose_response")
    assert stop(emulator, client, session_id).status_code == 409  # which the client learns from its retry
    assert emulator.requests[-1].fault is None


def test_a_dropped_request_never_happened(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    emulator.fault("work.stop", "drop")
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
        stop(emulator, client, session_id)
    assert emulator.work(session_id)["state"] == "queued"
    assert (emulator.requests[-1].status, emulator.requests[-1].fault) == (0, "drop")
    assert stop(emulator, client, session_id).status_code == 200


@pytest.mark.parametrize(
    ("status", "type_"),
    [
        (500, "api_error"),
        (503, "api_error"),
        (529, "overloaded_error"),
        (429, "rate_limit_error"),
        (404, "not_found_error"),
    ],
)
def test_a_failed_request_never_happened(emulator: Emulator, client: httpx2.Client, status: int, type_: str) -> None:
    session_id = emulator.create_session()
    emulator.fault("work.stop", "fail", status=status)
    response = stop(emulator, client, session_id)
    assert (response.status_code, response.json()["error"]["type"]) == (status, type_)
    assert emulator.work(session_id)["state"] == "queued"


def test_a_delayed_response_was_recorded_at_once(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    emulator.fault("work.stop", "delay", seconds=3600)
    thread, answers = in_thread(lambda: stop(emulator, client, session_id))
    emulator.wait_until(lambda: emulator.work(session_id)["state"] == "stopped")
    assert answers == []
    emulator.advance(3601)
    thread.join(10)
    assert [answer.status_code for answer in answers] == [200]


def test_a_delayed_request_is_carried_out_later(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    fault = emulator.fault("work.stop", "delay_request", seconds=3600)
    thread, answers = in_thread(lambda: stop(emulator, client, session_id))
    emulator.wait_until(lambda: fault.hits == 1)
    assert emulator.work(session_id)["state"] == "queued"
    emulator.advance(3601)
    thread.join(10)
    assert [answer.status_code for answer in answers] == [200]


def test_a_duplicated_request_is_carried_out_twice(emulator: Emulator, client: httpx2.Client) -> None:
    emulator.fault("sessions.create", "duplicate")
    body = {"agent": emulator.agent_id, "environment_id": emulator.environment_id}
    client.post("/v1/sessions", json=body, headers=bearer(emulator.api_key))
    assert emulator.stats()["depth"] == 2
    session_id = emulator.create_session()
    emulator.fault("work.stop", "duplicate")
    assert stop(emulator, client, session_id).status_code == 409  # the answer to the second


def test_count_and_after(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    emulator.fault("work.list", "fail", count=2, after=1, status=503)
    statuses = [client.get(work_path(emulator)).status_code for _ in range(5)]
    assert statuses == [200, 503, 503, 200, 200]
    assert client.get(f"/v1/sessions/{session_id}").status_code == 200


def test_faults_are_met_in_the_order_of_arming(emulator: Emulator, client: httpx2.Client) -> None:
    emulator.fault("work.list", "fail", status=500)
    emulator.fault("*", "fail", count=2, status=503)
    first, second = client.get(work_path(emulator)), client.get(work_path(emulator))
    third, fourth = client.get(work_path(emulator, "/stats")), client.get(work_path(emulator, "/stats"))
    assert [each.status_code for each in (first, second, third, fourth)] == [500, 503, 503, 200]


def test_a_fault_may_last_until_it_is_cleared(emulator: Emulator, client: httpx2.Client) -> None:
    fault = emulator.fault("work.list", "fail", count=None)
    assert {client.get(work_path(emulator)).status_code for _ in range(4)} == {500}
    assert emulator.faults() == [fault]
    emulator.clear_faults()
    assert client.get(work_path(emulator)).status_code == 200


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (("work.acks", "drop"), r"operation: 'work\.acks' is not one of \*, agents\.create"),
        (("work.ack", "explode"), "kind: 'explode' is not one of delay, "),
        (("work.ack", "drop", 0), "count: at least 1"),
        (("work.ack", "delay"), "seconds: delay needs"),
        (("work.ack", "fail", 1, 200), "status: 200 is no failure"),
        (("work.ack", "drop", 1, 500, 0.0, -1), "after: not negative"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(emulator: Emulator, values: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        emulator._faults.arm(Fault(*values))


async def test_the_sdk_sees_a_broken_connection_and_a_status(emulator: Emulator, runner: AsyncAnthropic) -> None:
    work = runner.beta.environments.work
    emulator.fault("work.poll", "lose_response")
    with pytest.raises(APIConnectionError):
        await work.poll(emulator.environment_id)
    emulator.fault("work.poll", "fail", status=429)
    with pytest.raises(RateLimitError):
        await work.poll(emulator.environment_id)


async def test_a_lost_hand_out_is_offered_again(emulator: Emulator, runner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.fault("work.poll", "lose_response")
    with pytest.raises(APIConnectionError):
        await runner.beta.environments.work.poll(emulator.environment_id)
    assert emulator.stats()["pending"] == 1
    emulator.advance(6)
    assert (await claim(runner, emulator.environment_id)).id == session_id


async def test_a_lost_beat_breaks_the_chain(emulator: Emulator, runner: AsyncAnthropic) -> None:
    """What the SDK's worker reads as a lost lease: its next beat repeats the old value."""
    session_id = emulator.create_session()
    await claim(runner, emulator.environment_id)
    known = emulator.work(session_id)["latest_heartbeat_at"]
    beat = runner.beta.environments.work.heartbeat
    emulator.fault("work.heartbeat", "lose_response")
    with pytest.raises(APIConnectionError):
        await beat(session_id, environment_id=emulator.environment_id, expected_last_heartbeat=known)
    with pytest.raises(APIStatusError) as refusal:
        await beat(session_id, environment_id=emulator.environment_id, expected_last_heartbeat=known)
    assert refusal.value.status_code == 412


async def test_a_worker_survives_a_burst(emulator: Emulator, owner: AsyncAnthropic, tmp_path: Path) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!echo still here")
    emulator.fault("events.send", "lose_response")
    emulator.fault("sessions.get", "fail", status=503)
    async with serving(worker_for(emulator, owner.with_options(max_retries=2), tmp_path, max_idle=0.2)):
        await asyncio.to_thread(emulator.wait_idle, session_id)
    assert emulator.events(session_id, "agent.message")[0]["content"][0]["text"] == "still here"
    assert len(emulator.events(session_id, "user.tool_result")) == 1


# Streams


async def read(stream: AsyncIterator[Any], see: Callable[[str], None]) -> None:
    async for event in stream:
        see(event.type)


async def open_and_read(
    owner: AsyncAnthropic, session_id: str, see: Callable[[str], None], opened: Callable[[], Any]
) -> None:
    async with await owner.beta.sessions.events.stream(session_id) as stream:
        opened()
        await read(aiter(stream), see)


@pytest.mark.parametrize("count", [0, 1, 4])
async def test_a_stream_is_cut_after_n_events(emulator: Emulator, owner: AsyncAnthropic, count: int) -> None:
    session_id = emulator.create_session()
    cut = emulator.cut_stream(session_id, after_events=count)
    seen: list[str] = []
    with pytest.raises(httpx2.RemoteProtocolError, match="incomplete"):
        await open_and_read(owner, session_id, seen.append, lambda: emulator.say(session_id, "hello"))
    assert (len(seen), cut.hits, emulator.faults()) == (count, 1, [])
    async with await owner.beta.sessions.events.stream(session_id) as stream:  # the next one is whole
        emulator.delete_session(session_id)
        assert [event.type async for event in stream] == ["session.deleted"]


async def test_a_quiet_open_stream_is_cut_at_once(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id, other = emulator.create_session(), emulator.create_session()
    seen: list[str] = []
    async with (
        await owner.beta.sessions.events.stream(other) as whole,
        await owner.beta.sessions.events.stream(session_id) as stream,
    ):
        emulator.say(session_id, "hello")
        async for event in stream:
            if event.type == "session.status_idle":
                break
        emulator.cut_stream(session_id)
        async with asyncio.timeout(10):  # sooner than the next ping
            with pytest.raises(httpx2.RemoteProtocolError):
                await read(aiter(stream), seen.append)
        assert seen == []
        emulator.delete_session(other)
        assert [event.type async for event in whole] == ["session.deleted"]


def test_a_ping_is_no_event(emulator: Emulator, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.01)
    session_id = emulator.create_session()
    cut = emulator.cut_stream(after_events=1)
    with client.stream("GET", f"/v1/sessions/{session_id}/events/stream") as response:
        lines = response.iter_lines()
        assert [line for line in itertools.islice(lines, 9) if line.startswith("event")] == ["event: ping"] * 3
        assert cut.hits == 0
        emulator.say(session_id, "hello")
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)
    assert cut.hits == 1


async def test_events_before_the_arming_do_not_count(emulator: Emulator, owner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    seen: list[str] = []
    async with await owner.beta.sessions.events.stream(session_id) as stream:
        emulator.say(session_id, "!true")
        async for event in stream:
            if event.type == "session.status_idle":
                break
        emulator.cut_stream(after_events=1)
        emulator.send(session_id, result(emulator.pending_calls(session_id)[0]))
        with pytest.raises(httpx2.RemoteProtocolError):
            await read(aiter(stream), seen.append)
    assert seen == ["user.tool_result"]


async def test_a_worker_reads_on_after_a_cut(emulator: Emulator, owner: AsyncAnthropic, tmp_path: Path) -> None:
    session_id = emulator.create_session()
    cut = emulator.cut_stream(session_id, after_events=2)
    async with serving(worker_for(emulator, owner, tmp_path, max_idle=5)):
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "active")
        emulator.say(session_id, "!echo whole")
        await asyncio.to_thread(emulator.wait_idle, session_id)
    assert cut.hits == 1
    assert emulator.events(session_id, "agent.message")[0]["content"][0]["text"] == "whole"


def test_a_cut_that_cannot_be_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="after_events"):
        emulator.cut_stream(after_events=-1)


# The clock it shows


def test_a_skew_moves_what_is_shown_and_nothing_else(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    emulator.skew(-7200)
    response = client.get(f"/v1/sessions/{session_id}")
    shown = response.json()
    true = emulator.session(session_id)
    assert at(true["created_at"]) - at(shown["created_at"]) == timedelta(hours=2)
    assert shown["metadata"] == true["metadata"]
    date = parsedate_to_datetime(response.headers["date"])
    assert abs(emulator.now() - date - timedelta(hours=2)) < timedelta(seconds=5)
    listed = client.get(f"/v1/sessions/{session_id}/events", params={"created_at[gte]": shown["created_at"]}).json()
    assert len(listed["data"]) == len(emulator.events(session_id))
    emulator.advance(299)
    emulator.skew(0)
    assert client.get(f"/v1/sessions/{session_id}").json()["created_at"] == true["created_at"]


def test_a_beat_chain_survives_a_changing_skew(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    client.get(work_path(emulator, "/poll"))
    client.post(work_path(emulator, f"/{session_id}/ack"))
    expected = "NO_HEARTBEAT"
    for seconds in (0, 3600, -3600, 0):
        emulator.skew(seconds)
        path = work_path(emulator, f"/{session_id}/heartbeat")
        reply = client.post(path, params={"expected_last_heartbeat": expected})
        assert reply.status_code == 200
        expected = reply.json()["last_heartbeat"]
        true = at(emulator.work(session_id)["latest_heartbeat_at"])
        assert at(expected) - true == timedelta(seconds=seconds)
        emulator.advance(200)  # the lease does not see the skew
        assert emulator.work(session_id)["state"] == "active"


def test_a_stream_shows_the_skew(emulator: Emulator, client: httpx2.Client) -> None:
    session_id = emulator.create_session()
    emulator.skew(3600)
    with client.stream("GET", f"/v1/sessions/{session_id}/events/stream") as response:
        emulator.say(session_id, "hello")
        running = next(line for line in response.iter_lines() if "session.status_running" in line and "data" in line)
    true = at(emulator.events(session_id, "session.status_running")[0]["processed_at"])
    assert (true + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%S.%fZ") in running


# Health checks and the truth


async def test_a_worker_skips_a_health_check(emulator: Emulator, owner: AsyncAnthropic, tmp_path: Path) -> None:
    item = emulator.add_healthcheck()
    assert (item["data"]["type"], item["state"]) == ("healthcheck", "queued")
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    async with serving(worker_for(emulator, owner, tmp_path, max_idle=0.2)):
        await asyncio.to_thread(emulator.wait_idle, session_id)
    async with client_of(emulator, emulator.api_key) as client:
        found = await client.beta.environments.work.retrieve(item["id"], environment_id=emulator.environment_id)
    assert found.state == "stopped"
    assert emulator.stats()["depth"] == 0


async def test_the_truth_tells_two_leases_apart(emulator: Emulator, runner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.report_execution("bash", "early", session_id)
    await claim(runner, emulator.environment_id)
    emulator.report_execution("sevt_1", "one", session_id, lease_epoch=1)
    emulator.stop_work(session_id, force=True)
    emulator.say(session_id, "again")
    await claim(runner, emulator.environment_id)
    emulator.report_execution("sevt_1", "one", session_id, lease_epoch=1)
    seen = [(one.runner, one.lease_epoch, one.actual_epoch, one.work_state) for one in emulator.executions]
    assert seen == [("early", None, 0, "queued"), ("one", 1, 1, "active"), ("one", 1, 2, "active")]
