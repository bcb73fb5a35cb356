"""What the recordings of the real service show, asserted against the emulator with the real SDK as the driver."""

from __future__ import annotations

import asyncio
import itertools
from datetime import timedelta
from pathlib import Path

import pytest
from anthropic import APIStatusError, AsyncAnthropic

from tests.emulator.support import MakeWorker, at, claim, client_of, idles, result, serving, types_of, worker_for
from tools.emulator import Emulator, call, end, say, tools

ROUND_TRIP = [
    "session.status_running",
    "session.thread_status_running",
    "user.message",
    "span.model_request_start",
    "agent.tool_use",
    "span.model_request_end",
    "session.thread_status_idle",
    "session.usage",
    "session.status_idle",
    "user.tool_result",
    "session.status_running",
    "session.thread_status_running",
    "span.model_request_start",
    "agent.message",
    "span.model_request_end",
    "session.thread_status_idle",
    "session.usage",
    "session.status_idle",
]


async def test_the_worker_serves_a_turn(emulator: Emulator, make_worker: MakeWorker, tmp_path: Path) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!echo hello > greeting && cat greeting")
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_idle, session_id)
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "stopped")

    assert (tmp_path / "greeting").read_text() == "hello\n"
    assert types_of(emulator.events(session_id)) == ROUND_TRIP
    assert emulator.events(session_id, "agent.message")[0]["content"] == [{"type": "text", "text": "hello"}]
    assert [reason["type"] for reason in idles(emulator, session_id)] == ["requires_action", "end_turn"]


async def test_the_requests_of_a_worker_come_in_the_recorded_order(emulator: Emulator, make_worker: MakeWorker) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "stopped")

    seen = [record for record in emulator.requests if record.operation != "work.heartbeat"]
    assert [record.operation for record in seen][:7] == [
        "work.poll",
        "work.ack",
        "sessions.get",
        "events.stream",
        "events.list",
        "events.send",
        "work.stop",
    ]
    assert [record.helper for record in seen][:4] == [
        "environments-work-poller",
        "environments-work-poller",
        "environments-worker",
        "session-tool-runner",
    ]
    assert {record.credential for record in seen[2:7]} == {"sessions_token"}
    assert seen[0].worker_id
    assert seen[0].query["block_ms"] == ["999"]


async def test_timestamps_of_a_normal_run(emulator: Emulator, make_worker: MakeWorker) -> None:
    session_id = emulator.create_session()
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["latest_heartbeat_at"])
    work = emulator.work(session_id)

    stamps = [work[name] for name in ("created_at", "started_at", "acknowledged_at", "latest_heartbeat_at")]
    assert stamps == sorted(stamps)
    assert work["started_at"] < work["acknowledged_at"]
    assert work["id"] == session_id == work["data"]["id"]
    assert work["secret"] is None


async def test_handle_item_runs_on_the_secret_alone(
    emulator: Emulator, runner: AsyncAnthropic, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_ENVIRONMENT_KEY", raising=False)
    session_id = emulator.create_session()
    emulator.say(session_id, "!echo from the sandbox")
    item = await runner.beta.environments.work.poll(emulator.environment_id)
    assert item is not None
    await runner.beta.environments.work.ack(item.id, environment_id=emulator.environment_id)
    worker = make_worker()
    worker._environment_key = None
    await worker.handle_item(
        work_id=item.id, environment_id=item.environment_id, session_id=item.data.id, work_secret=item.secret
    )

    assert emulator.events(session_id, "agent.message")[0]["content"][0]["text"] == "from the sandbox"
    assert emulator.work(session_id)["state"] == "stopped"
    worked = [record for record in emulator.requests if record.operation not in ("work.poll", "work.ack")]
    assert {record.credential for record in worked} == {"sessions_token"}


async def test_a_graceful_stop_waits_for_the_worker(tmp_path: Path) -> None:
    """The worker beats every second at the shortest lease, so it learns of the stop within a beat."""
    with Emulator(lease_ttl=2) as emulator:
        session_id = emulator.create_session()
        async with (
            client_of(emulator, emulator.api_key) as client,
            serving(worker_for(emulator, client, tmp_path, max_idle=60)),
        ):
            await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "active")
            stopping = emulator.stop_work(session_id)
            await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "stopped")
        stopped = emulator.work(session_id)

    assert stopping["state"] == "stopping"
    assert stopping["stopped_at"] is None
    assert stopped["latest_heartbeat_at"] == stopping["latest_heartbeat_at"]
    assert stopped["stop_requested_at"] == stopping["stop_requested_at"]
    assert at(stopped["stopped_at"]) - at(stopped["stop_requested_at"]) < timedelta(seconds=2)


async def test_a_dead_worker_strands_its_session(emulator: Emulator, runner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!sleep 1000")
    item = await claim(runner, emulator.environment_id)
    before = emulator.events(session_id)
    beat = at(emulator.work(session_id)["latest_heartbeat_at"])

    emulator.advance(299)
    assert emulator.work(session_id)["state"] == "active"
    emulator.advance(62)
    work = emulator.work(session_id)
    assert work["state"] == "stopped"
    assert work["stopped_at"] == work["stop_requested_at"]
    assert timedelta(seconds=300) <= at(work["stopped_at"]) - beat <= timedelta(seconds=360)
    assert emulator.events(session_id) == before
    assert idles(emulator, session_id)[-1]["type"] == "requires_action"
    assert await runner.beta.environments.work.poll(emulator.environment_id) is None
    assert emulator.stats()["depth"] == 0

    emulator.send(session_id, {"type": "user.interrupt"})
    again = await claim(runner, emulator.environment_id)
    assert again.id == item.id


async def test_stop_then_message_polls_the_same_id_again(emulator: Emulator, runner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    item = await claim(runner, emulator.environment_id)
    await runner.beta.environments.work.stop(item.id, environment_id=item.environment_id, force=True)
    emulator.say(session_id, "!true")

    queued = emulator.work(session_id)
    assert queued["state"] == "queued"
    assert queued["started_at"] is queued["acknowledged_at"] is queued["latest_heartbeat_at"] is None
    assert queued["stop_requested_at"] is queued["stopped_at"] is None
    again = await claim(runner, emulator.environment_id)  # which beats with NO_HEARTBEAT
    assert again.id == item.id
    assert again.secret != item.secret


async def test_a_message_to_a_live_item_queues_nothing(emulator: Emulator, runner: AsyncAnthropic) -> None:
    session_id = emulator.create_session()
    await claim(runner, emulator.environment_id)
    emulator.say(session_id, "hello")
    assert emulator.work(session_id)["state"] == "active"
    assert await runner.beta.environments.work.poll(emulator.environment_id) is None


def test_one_of_two_results_repeats_the_idle_with_the_other(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    emulator.set_script(session_id, [tools(call("bash", command="a"), call("bash", command="b")), say("ok"), end()])
    emulator.say(session_id, "go")
    first, second = (event["id"] for event in emulator.events(session_id, "agent.tool_use"))
    before = len(emulator.events(session_id))
    emulator.send(session_id, result(first))

    assert types_of(emulator.events(session_id))[before:] == [
        "user.tool_result",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    assert idles(emulator, session_id) == [
        {"type": "requires_action", "event_ids": [first, second]},
        {"type": "requires_action", "event_ids": [second]},
    ]
    emulator.send(session_id, result(second))
    assert idles(emulator, session_id)[-1] == {"type": "end_turn"}
    assert len(emulator.events(session_id, "session.status_running")) == 2


async def test_every_idle_follows_its_usage_and_time_only_grows(emulator: Emulator, make_worker: MakeWorker) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!echo 1\n!echo 2\n!exit 3")
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_idle, session_id)
    events = emulator.events(session_id)
    types = types_of(events)

    ends = [index for index, type_ in enumerate(types) if type_ == "session.status_idle"]
    assert len(ends) == 4
    for index in ends:
        assert types[index - 2 : index] == ["session.thread_status_idle", "session.usage"]
        assert events[index - 2]["stop_reason"] == events[index]["stop_reason"]
    stamps = [at(event["processed_at"]) for event in events]
    assert all(later - earlier >= timedelta(microseconds=1) for earlier, later in itertools.pairwise(stamps))


async def test_the_worker_skips_a_terminated_session(emulator: Emulator, make_worker: MakeWorker) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!touch ran")
    emulator.archive_session(session_id)
    async with serving(make_worker()):
        await asyncio.to_thread(emulator.wait_until, lambda: emulator.work(session_id)["state"] == "stopped")
    assert emulator.events(session_id, "user.tool_result") == []


async def test_the_sdk_swallows_a_second_stop(emulator: Emulator, runner: AsyncAnthropic) -> None:
    emulator.create_session()
    item = await claim(runner, emulator.environment_id)
    work = runner.beta.environments.work
    await work.stop(item.id, environment_id=item.environment_id, force=True)
    with pytest.raises(APIStatusError) as refusal:
        await work.stop(item.id, environment_id=item.environment_id, force=True)
    assert refusal.value.status_code == 409
