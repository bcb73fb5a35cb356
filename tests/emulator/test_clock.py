"""The clock, waiting for a change, and the invariants of the pure state under random histories."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.emulator import Clock, Emulator, Step, Switches, call, end, say, sleep, tools
from tools.emulator.clock import stamp
from tools.emulator.errors import EmulatorError
from tools.emulator.params import (
    AgentCreateBody,
    EnvironmentCreateBody,
    SelfHosted,
    SessionCreateBody,
    UserInterrupt,
    UserMessage,
    UserToolResult,
)
from tools.emulator.state import World
from tools.emulator.watch import WAIT_SECONDS

START = datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_the_clock_runs_and_jumps() -> None:
    clock = Clock(START)
    jumps: list[datetime] = []
    clock.on_jump(lambda: jumps.append(clock.now()))
    before = clock.now()
    assert START <= before <= clock.now()
    clock.advance(3600)
    assert clock.now() - before >= timedelta(hours=1)
    assert len(jumps) == 1
    assert jumps[0] >= before + timedelta(hours=1)
    with pytest.raises(ValueError, match="forward"):
        clock.advance(-1)


def test_timestamps_have_microseconds_and_a_z() -> None:
    assert stamp(START) == "2026-11-23T12:00:00.000000Z"


def test_an_emulator_can_be_given_its_clock() -> None:
    emulator = Emulator(clock=Clock(START))
    assert emulator.session(emulator.create_session())["created_at"].startswith("2026-11-23T12:00:0")


def test_a_waiter_is_woken_by_a_change_of_another_thread() -> None:
    emulator = Emulator()
    session_id = emulator.create_session()
    waiting = threading.Event()

    def is_done() -> bool:
        waiting.set()
        return bool(emulator.events(session_id, "agent.message"))

    def speak() -> None:
        waiting.wait(60)
        emulator.say(session_id, "hello")

    thread = threading.Thread(target=speak)
    thread.start()
    assert emulator.wait_until(is_done, timeout=60) is True
    thread.join()


def test_a_wait_ends_with_a_timeout() -> None:
    emulator = Emulator()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not true within 0\.05 s"):
        emulator.wait_until(lambda: False, timeout=0.05)
    assert time.monotonic() - started < WAIT_SECONDS


def test_an_emulator_starts_and_stops_more_than_once() -> None:
    emulator = Emulator()
    with pytest.raises(RuntimeError, match="has not been started"):
        _ = emulator.url
    with emulator:
        session_id = emulator.create_session()
        with pytest.raises(RuntimeError, match="is running"):
            emulator.start()
    emulator.stop()
    with emulator:
        assert emulator.work(session_id)["state"] == "queued"
    assert [thread for thread in threading.enumerate() if thread.name == "emulator"] == []


ACTIONS = ["message", "command", "interrupt", "answer", "poll", "ack", "beat", "stop", "force", "wait", "long wait"]


@settings(max_examples=150, deadline=None)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), max_size=40),
    lapse=st.sampled_from(["stop", "requeue"]),
    waiting=st.sampled_from(["requeue", "strand"]),
)
def test_no_history_breaks_the_rules(actions: list[str], lapse: str, waiting: str) -> None:
    switches = Switches(lease_lapse=lapse, unprocessed_input_at_stop=waiting)  # type: ignore[arg-type]
    transitions: list[tuple[str, datetime]] = []
    world = World(switches, timedelta(seconds=300), lambda type_, _, at: transitions.append((type_, at)), START)
    environment = world.create_environment(
        EnvironmentCreateBody(name="e", config=SelfHosted(type="self_hosted")), START
    )
    agent = world.create_agent(AgentCreateBody(name="a", model="m"), START)
    script: list[Step] = [tools(call("bash", command="a"), call("bash", command="b")), sleep(5), say("done"), end()]
    world.default_script = script * 40
    session = world.create_session(SessionCreateBody(agent=agent.id, environment_id=environment.id), START)
    queue, now, inputs = environment.queue, START, 0
    for action in actions:
        now += timedelta(milliseconds=100)
        world.tick(now)
        item = queue.of_session(session.id)
        assert item is not None
        was_live = item.is_live
        try:
            match action:
                case "message" | "command":
                    text = {"type": "text", "text": "!x" if action == "command" else "x"}
                    message = UserMessage.model_validate({"type": "user.message", "content": [text]})
                    world.send(session.id, [message], now)
                    inputs += 1
                case "interrupt":
                    world.send(session.id, [UserInterrupt(type="user.interrupt")], now)
                case "answer":
                    ids = session.pending_ids()
                    answers = [UserToolResult(type="user.tool_result", tool_use_id=id_) for id_ in ids[:1]]
                    if answers:
                        world.send(session.id, answers, now)
                case "poll":
                    handed = world.hand_out(environment.id, timedelta(seconds=5), now)
                    assert handed is None or handed.state == "queued"
                case "ack":
                    queue.ack(item.id, now)
                case "beat":
                    queue.heartbeat(item.id, now, None, None)
                case "stop" | "force":
                    world.stopped(queue.stop(item.id, now, force=action == "force"), now)
                case "wait":
                    now += timedelta(seconds=6)
                case _:
                    now += timedelta(seconds=400)
        except EmulatorError:
            assert item.is_live == was_live  # a refusal changes nothing

        assert queue.newest_first() == [item]  # one session, one item
        if item.state == "stopped":
            assert item.stop_requested_at is not None
            assert item.stopped_at is not None
            assert item.stop_requested_at <= item.stopped_at
        if item.state == "queued":
            assert item.acknowledged_at is item.latest_heartbeat_at is item.stopped_at is None
        if item.state == "active":
            assert item.acknowledged_at is not None
            assert item.latest_heartbeat_at is not None
            assert item.acknowledged_at <= item.latest_heartbeat_at
    stamps = [event["processed_at"] for event in session.log]
    assert stamps == sorted(set(stamps))
    types = [event["type"] for event in session.log]
    for index in (index for index, type_ in enumerate(types) if type_ == "session.status_idle"):
        assert types[index - 2 : index] == ["session.thread_status_idle", "session.usage"]
    assert types.count("user.message") + len(session.inbox) == inputs
    told = [type_ for type_, _ in transitions]
    assert types.count("session.status_running") == told.count("session.status_run_started")
    is_running = session.status == "running"
    assert told.count("session.status_idled") == told.count("session.status_run_started") - is_running
    assert types.count("span.model_request_start") - types.count("span.model_request_end") == (
        session.turn is not None and session.turn.model_request_id is not None
    )
