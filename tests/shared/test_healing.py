"""Healing against the emulator: strands end, and what is no strand is left alone (R9).

A runner that dies is played with the SDK: it acks, beats, and is never heard of again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from anthropic import AsyncAnthropic

from shared.dispatcher import Dispatcher
from shared.healing import LATEST_PER_SWEEP, LOOKS_PER_HINT, LOST, OTHERS_PER_SWEEP, Healer
from shared.webhook import WebhookEvent
from tests.shared.conftest import MakeDispatcher
from tests.shared.support import (
    HEALABLE_SECONDS,
    Detour,
    FakeProvider,
    claim,
    count,
    says_ready,
    settings_for,
)
from tools.emulator import Clock, Emulator, Switches, call, custom, delegate, end, repeat_output, say, tools
from tools.emulator.switches import values_of

LAPSE_SECONDS = 361.0  # past the lease and the server's sweeper
TWO_CALLS = [tools(call("bash", command="one")), tools(call("bash", command="two")), repeat_output, end()]


class World:
    """An emulator with its switches, a host on it, and the runner's part in between."""

    def __init__(
        self, emulator: Emulator, client: AsyncAnthropic, dispatcher: Dispatcher, provider: FakeProvider
    ) -> None:
        self.emulator = emulator
        self.client = client
        self.dispatcher = dispatcher
        self.provider = provider

    async def strand(self, *steps: Any, session: str | None = None) -> str:
        """A session with a turn under way whose runner claimed the item, died, and whose lease has lapsed."""
        session = session or self.emulator.create_session()
        if steps:
            self.emulator.set_script(session, steps)
        await self.dispatcher.drain()
        await claim(self.client, self.emulator, session)
        self.emulator.say(session, "!go")
        self.emulator.advance(LAPSE_SECONDS)
        self.emulator.advance(HEALABLE_SECONDS)
        assert self.emulator.work(session)["state"] == "stopped"
        return session

    async def claim_and_die(self, session: str) -> None:
        await claim(self.client, self.emulator, session)
        self.emulator.advance(LAPSE_SECONDS)
        self.emulator.advance(HEALABLE_SECONDS)
        assert self.emulator.work(session)["state"] == "stopped"

    async def sweep_later(self) -> None:
        self.emulator.advance(HEALABLE_SECONDS)
        await self.dispatcher.sweep()

    def results(self, session: str) -> list[tuple[str, bool]]:
        events = self.emulator.events(session, "user.tool_result")
        return [(event["content"][0]["text"], event["is_error"]) for event in events]

    def sent(self, session: str, *types: str) -> int:
        return len(self.emulator.events(session, *types))

    def said(self, session: str) -> str:
        text: str = self.emulator.events(session, "agent.message")[-1]["content"][0]["text"]
        return text


MakeWorld = Callable[..., World]


@pytest.fixture
async def make_world(make_dispatcher: MakeDispatcher) -> AsyncIterator[MakeWorld]:
    made: list[World] = []

    def make(switches: Switches | None = None, clock: Clock | None = None) -> World:
        emulator = Emulator(switches=switches, clock=clock).start()
        client = AsyncAnthropic(auth_token=emulator.environment_key, base_url=emulator.url, max_retries=0)
        provider = FakeProvider(says_ready)
        made.append(World(emulator, client, make_dispatcher(provider, on=emulator), provider))
        return made[-1]

    yield make
    for world in made:
        await world.client.close()
        await world.dispatcher.close(0)
        world.emulator.stop()


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    return make_world()


# --- strands ---------------------------------------------------------------------------------------------------------


async def test_a_call_whose_runner_died_is_answered_once_and_the_session_goes_on(world: World) -> None:
    session = await world.strand()
    launched = len(world.provider.started)
    await world.dispatcher.sweep()
    assert world.results(session) == [(LOST, True)]
    assert world.said(session) == f"Error: {LOST}"
    assert world.provider.started[launched:] == [session]  # queued again by the answer, and launched in the same sweep
    await world.sweep_later()
    assert len(world.results(session)) == 1
    assert world.sent(session, "user.interrupt") == 0


async def test_all_calls_of_a_strand_are_answered_together(world: World) -> None:
    calls = tools(*(call(name, command="x") for name in ("bash", "read", "write", "edit", "glob", "grep")))
    session = await world.strand(calls, say("told"), end())
    await world.dispatcher.sweep()
    assert len(world.results(session)) == 6
    assert world.said(session) == "told"
    assert count(world.emulator, "events.send") == 1


async def test_a_call_that_a_person_allows_while_the_sweep_is_on_its_way_is_its_new_runners(world: World) -> None:
    """The list says `stopped`, and is old by the time the item is looked at."""
    session = await world.strand(tools(call("bash", permission="ask", command="x")), repeat_output, end())
    healer = Healer(world.client, settings_for(world.emulator))
    items = await healer.list_work()
    assert items
    world.emulator.advance(2.0)  # the API tells its time in whole seconds
    (waiting,) = world.emulator.pending_calls(session)
    world.emulator.send(session, {"type": "user.tool_confirmation", "tool_use_id": waiting, "result": "allow"})
    await world.dispatcher.drain()
    await claim(world.client, world.emulator, session)
    assert await healer.heal(items) == 0
    assert world.results(session) == []


async def test_a_call_that_a_person_allowed_is_answered(world: World) -> None:
    session = await world.strand(tools(call("bash", permission="ask", command="x")), repeat_output, end())
    await world.dispatcher.sweep()
    assert world.results(session) == []
    (waiting,) = world.emulator.pending_calls(session)
    verdict = {"type": "user.tool_confirmation", "tool_use_id": waiting, "result": "allow"}
    world.emulator.send(session, verdict)
    await world.claim_and_die(session)
    await world.dispatcher.sweep()
    assert world.results(session) == [(LOST, True)]


async def test_runner_after_runner_may_die_without_an_interrupt(world: World) -> None:
    """Answers queue the session here, so the turn can always go on, however often it is stranded."""
    session = await world.strand(*TWO_CALLS)
    await world.dispatcher.sweep()
    await world.claim_and_die(session)
    await world.dispatcher.sweep()
    assert len(world.results(session)) == 2
    assert world.sent(session, "user.interrupt") == 0
    assert world.said(session) == f"Error: {LOST}"


async def test_where_answers_do_not_queue_the_second_one_brings_an_interrupt(make_world: MakeWorld) -> None:
    world = make_world(Switches(result_on_stopped_item="ignored"))
    session = await world.strand(*TWO_CALLS)
    await world.dispatcher.sweep()
    assert (len(world.results(session)), world.sent(session, "user.interrupt")) == (1, 0)
    await world.sweep_later()
    assert (len(world.results(session)), world.sent(session, "user.interrupt")) == (2, 1)
    assert world.emulator.work(session)["state"] == "queued"
    await world.sweep_later()
    assert (len(world.results(session)), world.sent(session, "user.interrupt")) == (2, 1)


@pytest.mark.parametrize(
    "other", [custom("theirs"), call("bash", permission="ask", command="x")], ids=["custom", "ask"]
)
async def test_no_interrupt_while_somebody_else_is_waited_for(make_world: MakeWorld, other: Any) -> None:
    world = make_world(Switches(result_on_stopped_item="ignored"))
    session = await world.strand(tools(call("bash", command="x")), tools(call("bash", command="y"), other), end())
    await world.dispatcher.sweep()
    await world.sweep_later()
    assert len(world.results(session)) == 2
    for _ in range(3):
        await world.sweep_later()
    assert (len(world.results(session)), world.sent(session, "user.interrupt")) == (2, 0)
    assert len(world.emulator.pending_calls(session)) == 1


async def test_a_late_answer_of_the_runner_is_no_treatment(make_world: MakeWorld) -> None:
    """A runner that hands over posts its answers after its stop. The agent may still go on without the rest."""
    world = make_world(Switches(result_on_stopped_item="ignored"))
    session = await world.strand(tools(call("bash", command="x"), call("bash", command="y")), say("told"), end())
    content = [{"type": "text", "text": "handed over"}]
    first = world.emulator.pending_calls(session)[0]
    world.emulator.send(session, {"type": "user.tool_result", "tool_use_id": first, "content": content})
    await world.sweep_later()
    assert [text for text, _ in world.results(session)] == ["handed over", LOST]
    assert (world.said(session), world.sent(session, "user.interrupt")) == ("told", 0)


async def test_a_call_of_a_sub_agent_is_answered(world: World) -> None:
    helper = delegate("helper", "do it", tools(call("bash", command="x")), repeat_output)
    session = await world.strand(helper, say("told"), end())
    await world.dispatcher.sweep()
    assert world.results(session) == [(LOST, True)]
    assert world.said(session) == "told"


async def test_a_denied_key_heals_nothing_and_breaks_nothing(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(Switches(environment_key_may_answer=False))
    session = await world.strand()
    await world.dispatcher.sweep()
    assert world.results(session) == []
    assert f"action=heal session={session}" in caplog.text


OTHER_SERVERS = [
    pytest.param({name: value}, id=f"{name}={value}")
    for name, values in values_of().items()
    for value in values[1:]
    if name not in ("lease_lapse", "environment_key_may_answer")  # the first leaves no strand, the second no cure
]


@pytest.mark.parametrize("switches", OTHER_SERVERS)
async def test_a_strand_ends_on_every_server_there_may_be(make_world: MakeWorld, switches: dict[str, Any]) -> None:
    world = make_world(Switches(**switches))
    unclaimed = world.emulator.create_session()
    world.emulator.say(unclaimed, "!go")
    await claim(world.client, world.emulator, unclaimed, beat=False)
    session = await world.strand()
    for _ in range(3):
        await world.sweep_later()
    for each in (session, unclaimed):
        assert world.results(each) == [(LOST, True)]
        assert world.said(each) == f"Error: {LOST}"
        assert world.sent(each, "user.interrupt") == 0


async def test_a_call_of_a_custom_tool_of_ours_is_answered_and_another_clients_is_not(
    make_world: MakeWorld, make_dispatcher: MakeDispatcher
) -> None:
    world = make_world()
    session = await world.strand(tools(custom("deploy"), custom("theirs"), call("bash", command="x")), end())
    settings = {"SANDBOX_TOOL_NAMES": " deploy, ticket"}
    await make_dispatcher(FakeProvider(), on=world.emulator, settings=settings).sweep()
    (answer,) = world.emulator.events(session, "user.custom_tool_result")
    ours, theirs = (event["id"] for event in world.emulator.events(session, "agent.custom_tool_use"))
    assert (answer["custom_tool_use_id"], answer["is_error"], answer["content"][0]["text"]) == (ours, True, LOST)
    assert world.results(session) == [(LOST, True)]
    assert world.emulator.pending_calls(session) == [theirs]


async def test_an_answer_to_a_custom_call_is_a_treatment_too(
    make_world: MakeWorld, make_dispatcher: MakeDispatcher
) -> None:
    world = make_world(Switches(result_on_stopped_item="ignored"))
    session = await world.strand(custom("deploy"), custom("deploy"), end())
    dispatcher = make_dispatcher(FakeProvider(), on=world.emulator, settings={"SANDBOX_TOOL_NAMES": "deploy"})
    for interrupts in (0, 1):
        await dispatcher.sweep()
        world.emulator.advance(HEALABLE_SECONDS)
        assert world.sent(session, "user.interrupt") == interrupts


# --- what is no strand of ours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "waits_for",
    [custom("theirs"), call("bash", permission="ask", command="x"), call("not_our_tool", command="x")],
    ids=["custom", "unconfirmed", "unknown tool"],
)
async def test_what_others_must_answer_is_left_alone(world: World, waits_for: Any) -> None:
    session = await world.strand(tools(waits_for), end())
    pending = world.emulator.pending_calls(session)
    await world.dispatcher.sweep()
    await world.sweep_later()
    assert world.emulator.pending_calls(session) == pending
    assert count(world.emulator, "events.send") == 0


async def test_a_denied_call_is_not_answered(world: World) -> None:
    mixed = tools(call("bash", permission="deny", command="x"), call("bash", command="y"))
    session = await world.strand(mixed, end())
    denied, allowed = (event["id"] for event in world.emulator.events(session, "agent.tool_use"))
    await world.dispatcher.sweep()
    answered = [event["tool_use_id"] for event in world.emulator.events(session, "user.tool_result")]
    assert (answered, denied in answered) == ([allowed], False)


async def test_a_call_that_a_person_denied_is_not_answered(world: World) -> None:
    two = tools(call("bash", permission="ask", command="x"), custom("theirs"))
    session = await world.strand(two, end())
    verdict = {
        "type": "user.tool_confirmation",
        "tool_use_id": world.emulator.pending_calls(session)[0],
        "result": "deny",
    }
    world.emulator.send(session, verdict)
    await world.claim_and_die(session)
    await world.dispatcher.sweep()
    assert count(world.emulator, "events.send") == 0


async def test_a_terminated_session_is_left_alone(world: World) -> None:
    session = await world.strand()
    world.emulator.archive_session(session)
    await world.dispatcher.sweep()
    assert world.results(session) == []


async def test_a_session_deleted_under_the_sweep_is_no_error(world: World, caplog: pytest.LogCaptureFixture) -> None:
    session = await world.strand()
    healer = Healer(world.client, settings_for(world.emulator))
    items = await healer.list_work()
    assert items is not None
    world.emulator.delete_session(session)
    assert await healer.heal(items) == 0
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


async def test_a_turn_that_an_interrupt_ended_is_over(world: World) -> None:
    session = await world.strand()
    world.emulator.send(session, {"type": "user.interrupt"})
    await world.claim_and_die(session)
    await world.dispatcher.sweep()
    assert world.results(session) == []


async def test_a_long_call_of_a_healthy_runner_is_left_alone(world: World) -> None:
    emulator, work = world.emulator, world.client.beta.environments.work
    session = emulator.create_session()
    emulator.say(session, "!sleep 3600")
    await world.dispatcher.drain()
    await claim(world.client, emulator, session)
    for _ in range(6):
        emulator.advance(200)
        await work.heartbeat(session, environment_id=emulator.environment_id)
        await world.dispatcher.sweep()
    assert emulator.work(session)["state"] == "active"
    assert count(emulator, "events.send") == count(emulator, "work.stop") == 0
    assert len(emulator.pending_calls(session)) == 1


async def test_a_runner_that_has_just_stopped_may_still_post_its_answers(world: World) -> None:
    emulator = world.emulator
    session = emulator.create_session()
    emulator.say(session, "!true")
    await world.dispatcher.drain()
    await claim(world.client, emulator, session)
    emulator.stop_work(session, force=True)
    emulator.advance(HEALABLE_SECONDS - 5)
    await world.dispatcher.sweep()
    assert world.results(session) == []
    emulator.advance(6)
    await world.dispatcher.sweep()
    assert len(world.results(session)) == 1


async def test_a_session_that_went_on_since_the_list_is_left_alone(world: World) -> None:
    """Between the list and the look, a new runner has taken the session and works on a new call."""
    emulator = world.emulator
    session = await world.strand(tools(call("bash", command="one")), end(), tools(call("bash", command="two")), end())
    emulator.send(session, {"type": "user.interrupt"})
    await world.claim_and_die(session)
    healer = Healer(world.client, settings_for(emulator))
    items = await healer.list_work()
    assert items is not None
    emulator.say(session, "again")
    await claim(world.client, emulator, session)
    assert len(emulator.pending_calls(session)) == 1
    assert await healer.heal(items) == 0
    assert world.results(session) == []


def change_events(detour: Detour, session: str, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Changes the log as it is read."""

    def apply(request: httpx2.Request, response: httpx2.Response) -> httpx2.Response | None:
        if request.method != "GET" or not request.url.path.endswith(f"/{session}/events"):
            return None
        page = response.json()
        change(page["data"])
        headers = {"date": response.headers["date"]}
        return httpx2.Response(200, json=page, headers=headers)

    detour.changes.append(apply)


async def test_a_call_of_a_thread_that_ended_is_not_answered(world: World, detour: Detour) -> None:
    session = await world.strand()

    def end_its_thread(events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "agent.tool_use":
                event["session_thread_id"] = "sthr_gone"
        ended = {"session_thread_id": "sthr_gone", "agent_name": "helper", "processed_at": events[-1]["processed_at"]}
        events.append({"id": "sevt_x", "type": "session.thread_status_terminated", **ended})

    change_events(detour, session, end_its_thread)
    await world.dispatcher.sweep()
    assert world.results(session) == []


async def test_an_answer_that_comes_while_we_look_is_not_given_twice(world: World, detour: Detour) -> None:
    session = await world.strand()
    (waiting,) = world.emulator.pending_calls(session)

    def another_host_answers(_: list[dict[str, Any]]) -> None:
        if world.emulator.pending_calls(session):
            world.emulator.send(session, {"type": "user.tool_result", "tool_use_id": waiting, "is_error": True})

    change_events(detour, session, another_host_answers)
    await world.dispatcher.sweep()
    assert count(world.emulator, "events.send") == 0


async def test_one_answer_that_comes_too_late_loses_the_others_for_one_sweep(world: World, detour: Detour) -> None:
    session = await world.strand(tools(call("bash", command="one"), call("bash", command="two")), say("told"), end())
    first, second = world.emulator.pending_calls(session)
    late = [{"type": "user.tool_result", "tool_use_id": first, "content": [{"type": "text", "text": "late"}]}]

    def the_dead_runner_answers(request: httpx2.Request, _: httpx2.Response) -> None:
        if late and request.method == "GET" and request.url.params.get("limit") == "1000":
            world.emulator.send(session, late.pop())

    detour.changes.append(the_dead_runner_answers)
    await world.dispatcher.sweep()
    assert world.emulator.pending_calls(session) == [second]
    await world.claim_and_die(session)  # the late answer has queued it
    await world.dispatcher.sweep()
    assert [text for text, _ in world.results(session)] == ["late", LOST]
    assert world.said(session) == "told"


async def test_the_sessions_own_status_is_what_counts(world: World, detour: Detour) -> None:
    session = await world.strand()

    def rescheduling(request: httpx2.Request, response: httpx2.Response) -> httpx2.Response | None:
        if not request.url.path.endswith(f"/sessions/{session}"):
            return None
        return httpx2.Response(200, json=response.json() | {"status": "rescheduling"})

    detour.changes.append(rescheduling)
    await world.dispatcher.sweep()
    assert world.results(session) == []


# --- acked and never claimed -----------------------------------------------------------------------------------------


async def test_an_item_acked_and_never_claimed_is_freed_and_its_turn_goes_on(world: World) -> None:
    emulator = world.emulator
    session = emulator.create_session()
    emulator.say(session, "!go")
    await claim(world.client, emulator, session, beat=False)
    emulator.advance(149)
    await world.dispatcher.sweep()
    assert emulator.work(session)["state"] == "starting"
    emulator.advance(3)
    await world.dispatcher.sweep()
    assert emulator.work(session)["state"] == "stopped"
    await world.sweep_later()
    assert world.results(session) == [(LOST, True)]
    assert world.said(session) == f"Error: {LOST}"


async def test_an_item_that_was_beaten_is_not_touched_whatever_its_state_is_called(world: World) -> None:
    emulator = world.emulator
    session = emulator.create_session()
    await claim(world.client, emulator, session)
    emulator.advance(160)
    healer = Healer(world.client, settings_for(emulator))
    items = await healer.list_work()
    assert items is not None
    items[0].state = "starting"
    assert await healer.heal(items) == 0
    assert count(emulator, "work.heartbeat") == 1


async def test_an_item_claimed_since_the_list_is_not_stopped(world: World, caplog: pytest.LogCaptureFixture) -> None:
    emulator = world.emulator
    session = emulator.create_session()
    await claim(world.client, emulator, session, beat=False)
    emulator.advance(160)
    healer = Healer(world.client, settings_for(emulator))
    items = await healer.list_work()
    assert items is not None
    await world.client.beta.environments.work.heartbeat(
        session, environment_id=emulator.environment_id, expected_last_heartbeat="NO_HEARTBEAT"
    )
    assert await healer.heal(items) == 0
    assert emulator.work(session)["state"] == "active"
    assert count(emulator, "work.stop") == 0
    assert "action=heal" not in caplog.text  # it is as it should be


async def test_an_item_that_is_stopping_already_is_not_stopped_again(world: World) -> None:
    emulator = world.emulator
    session = emulator.create_session()
    await claim(world.client, emulator, session, beat=False)
    emulator.advance(160)
    healer = Healer(world.client, settings_for(emulator))
    items = await healer.list_work()
    assert items is not None
    emulator.stop_work(session, force=True)
    assert await healer.heal(items) == 0
    assert count(emulator, "work.stop") == 0


async def test_work_ids_need_not_be_session_ids(make_world: MakeWorld) -> None:
    world = make_world(Switches(work_id="work_"))
    emulator = world.emulator
    unclaimed = emulator.create_session()
    await claim(world.client, emulator, unclaimed, beat=False)
    emulator.advance(160)
    await world.dispatcher.sweep()
    assert emulator.work(unclaimed)["state"] == "stopped"
    session = await world.strand()
    await world.dispatcher.sweep()
    assert world.results(session) == [(LOST, True)]


# --- held by nobody, and not let go ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["Z", "+00:00"], ids=["as listed", "written differently"])
async def test_an_item_whose_lease_never_lapses_is_freed_behind_a_fence(
    make_world: MakeWorld, detour: Detour, make_dispatcher: MakeDispatcher, offset: str
) -> None:
    world = make_world(Switches(lease_lapse="never"))
    emulator = world.emulator
    session = emulator.create_session()
    emulator.say(session, "!go")
    await claim(world.client, emulator, session)

    def another_spelling(request: httpx2.Request, response: httpx2.Response) -> httpx2.Response | None:
        if not request.url.path.endswith("/work"):
            return None
        page = response.json()
        for item in page["data"]:
            item["latest_heartbeat_at"] = item["latest_heartbeat_at"].replace("Z", offset)
        return httpx2.Response(200, json=page, headers={"date": response.headers["date"]})

    detour.changes.append(another_spelling)
    dispatcher = make_dispatcher(FakeProvider(), on=emulator)
    emulator.advance(595)
    await dispatcher.sweep()
    assert emulator.work(session)["state"] == "active"
    emulator.advance(10)
    await dispatcher.sweep()
    assert world.results(session) == [(LOST, True)]
    assert world.said(session) == f"Error: {LOST}"


async def test_what_a_runner_had_is_answered_before_the_next_one_begins(make_world: MakeWorld) -> None:
    """A stop queues the session at once where a message waits: the next runner would run the call again."""
    world = make_world(Switches(lease_lapse="never"))
    emulator = world.emulator
    session = emulator.create_session()
    emulator.say(session, "!go")
    await claim(world.client, emulator, session)
    emulator.say(session, "and then")
    emulator.advance(610)
    await world.dispatcher.sweep()
    assert world.results(session) == [(LOST, True)]
    asked = [request.operation for request in emulator.requests]
    assert asked.index("work.stop") < asked.index("events.send") < len(asked) - asked[::-1].index("work.poll")


async def test_a_runner_that_was_only_slow_keeps_its_item(make_world: MakeWorld) -> None:
    """It beats between the list and the fence."""
    world = make_world(Switches(lease_lapse="never"))
    emulator = world.emulator
    session = emulator.create_session()
    await claim(world.client, emulator, session)
    emulator.advance(700)
    healer = Healer(world.client, settings_for(emulator))
    items = await healer.list_work()
    assert items is not None
    await world.client.beta.environments.work.heartbeat(session, environment_id=emulator.environment_id)
    assert await healer.heal(items) == 0
    assert emulator.work(session)["state"] == "active"
    assert count(emulator, "work.stop") == 0


async def test_a_stop_that_nobody_completes_is_completed(make_world: MakeWorld) -> None:
    world = make_world(Switches(lease_lapse="never"))
    emulator = world.emulator
    session = emulator.create_session()
    emulator.say(session, "!go")
    await claim(world.client, emulator, session)
    emulator.advance(3000)  # its runner beat all the time, as far as this item tells
    await world.client.beta.environments.work.heartbeat(session, environment_id=emulator.environment_id)
    emulator.stop_work(session)
    emulator.advance(595)
    await world.dispatcher.sweep()
    assert emulator.work(session)["state"] == "stopping"
    emulator.advance(10)
    await world.dispatcher.sweep()
    assert count(emulator, "work.stop") == 1
    assert world.results(session) == [(LOST, True)]


@pytest.mark.parametrize(("text", "state"), [("!go", "queued"), ("hello", "stopped")])
async def test_a_stop_that_another_host_has_completed_is_not_completed_again(
    make_world: MakeWorld, text: str, state: str
) -> None:
    """A session with work is queued again by then, and any other one may be at the next moment: a stop would take it
    off the queue."""
    world = make_world(Switches(lease_lapse="never"))
    emulator = world.emulator
    session = emulator.create_session()
    emulator.say(session, text)
    await claim(world.client, emulator, session)
    emulator.stop_work(session)
    emulator.advance(610)
    healer = Healer(world.client, settings_for(emulator))
    items = await healer.list_work()
    assert items is not None
    other = Healer(world.client, settings_for(emulator))
    assert await other.heal(await other.list_work() or []) == 1
    assert emulator.work(session)["state"] == state
    assert await healer.heal(items) == 0
    assert emulator.work(session)["state"] == state
    assert count(emulator, "work.stop") == 1


async def test_a_stop_whose_answer_is_lost_is_not_sent_again(make_world: MakeWorld) -> None:
    """What is said meanwhile queues the session: a second stop would take it off the queue."""
    world = make_world(Switches(lease_lapse="never"))
    emulator = world.emulator
    session = emulator.create_session()
    emulator.say(session, "!go")
    await claim(world.client, emulator, session)
    emulator.stop_work(session)
    emulator.advance(610)
    emulator.fault("work.stop", "lose_response")
    healer = Healer(world.client.with_options(max_retries=2), settings_for(emulator))
    items = await healer.list_work()
    assert items is not None
    assert await healer.heal(items) == 0
    assert count(emulator, "work.stop") == 1
    assert emulator.work(session)["state"] != "stopping"


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("years", [-20, 20])
async def test_time_is_the_servers(make_world: MakeWorld, years: int) -> None:
    clock = Clock(dt.datetime.now(dt.UTC) + dt.timedelta(days=365 * years))
    world = make_world(clock=clock)
    session = world.emulator.create_session()
    world.emulator.say(session, "!go")
    await world.dispatcher.drain()
    await claim(world.client, world.emulator, session)
    world.emulator.stop_work(session, force=True)
    await world.dispatcher.sweep()
    assert world.results(session) == []
    await world.sweep_later()
    assert world.results(session) == [(LOST, True)]


async def test_a_server_whose_clock_is_wrong_is_taken_at_its_word(world: World) -> None:
    emulator = world.emulator
    emulator.skew(-86_400)
    session = emulator.create_session()
    emulator.say(session, "!go")
    await world.dispatcher.drain()
    await claim(world.client, emulator, session)
    emulator.stop_work(session, force=True)
    await world.dispatcher.sweep()
    assert world.results(session) == []
    await world.sweep_later()
    assert world.results(session) == [(LOST, True)]


@pytest.mark.parametrize("date", [None, "", "soon", "Mon, 99 Nov 2026 99:00:00 GMT"])
async def test_without_the_servers_time_nothing_is_judged_and_the_log_says_so(
    world: World, detour: Detour, date: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    session = await world.strand()

    def timeless(_: httpx2.Request, response: httpx2.Response) -> httpx2.Response:
        headers = {name: value for name, value in response.headers.items() if name != "date"}
        headers |= {} if date is None else {"date": date}
        return httpx2.Response(response.status_code, headers=headers, content=response.content)

    detour.changes.append(timeless)
    await world.dispatcher.sweep()
    assert world.results(session) == []
    assert "no usable Date" in caplog.text


# --- cost and fairness -----------------------------------------------------------------------------------------------


def finish(emulator: Emulator) -> str:
    """A session with a turn behind it and a stopped item."""
    session = emulator.create_session()
    emulator.say(session, "hello")
    emulator.stop_work(session, force=True)
    return session


async def test_a_finished_session_costs_one_small_request(world: World) -> None:
    for _ in range(10):
        finish(world.emulator)
    world.emulator.advance(HEALABLE_SECONDS)
    await world.dispatcher.sweep()
    records = [record for record in world.emulator.requests if record.operation == "events.list"]
    assert len(records) == 10
    assert {tuple(record.query["limit"]) for record in records} == {("1",)}
    assert count(world.emulator, "sessions.get") == 0


async def test_a_sweep_looks_at_so_many_and_at_the_latest_first(world: World) -> None:
    emulator = world.emulator
    stranded = emulator.create_session()  # the oldest item there is, stopped last
    for _ in range(400):
        finish(emulator)
    emulator.advance(HEALABLE_SECONDS)
    emulator.say(stranded, "!go")
    emulator.stop_work(stranded, force=True)
    emulator.advance(HEALABLE_SECONDS)
    await world.dispatcher.sweep()
    assert world.results(stranded) == [(LOST, True)]
    looks = [r for r in emulator.requests if r.operation == "events.list" and r.query["limit"] == ["1"]]
    assert len(looks) == LATEST_PER_SWEEP + OTHERS_PER_SWEEP


async def test_a_strand_behind_many_finished_sessions_is_found_by_hosts_without_memory(world: World) -> None:
    """A serverless sweep is a new process each time. Each finds it with a chance of two in three."""
    emulator = world.emulator
    stranded = emulator.create_session()
    emulator.say(stranded, "!go")
    emulator.stop_work(stranded, force=True)
    emulator.advance(HEALABLE_SECONDS)
    for _ in range(LATEST_PER_SWEEP + OTHERS_PER_SWEEP + 10):
        finish(emulator)
    emulator.advance(HEALABLE_SECONDS)
    for _ in range(70):
        healer = Healer(world.client, settings_for(emulator))
        items = await healer.list_work()
        assert items is not None
        if await healer.heal(items):
            break
    assert world.results(stranded) == [(LOST, True)]


async def test_what_a_webhook_has_named_is_looked_at_first_however_old(world: World) -> None:
    emulator = world.emulator
    stranded = emulator.create_session()
    emulator.say(stranded, "!go")
    emulator.stop_work(stranded, force=True)
    emulator.advance(HEALABLE_SECONDS)
    for _ in range(400):
        finish(emulator)
    emulator.advance(HEALABLE_SECONDS)
    world.dispatcher.suspect(WebhookEvent("whe_1", "session.status_idled", stranded))
    await world.dispatcher.sweep()
    assert world.results(stranded) == [(LOST, True)]


async def test_a_hint_is_forgotten_after_some_looks_and_there_are_only_so_many(world: World) -> None:
    emulator = world.emulator
    named = emulator.create_session()
    emulator.say(named, "hello")
    emulator.stop_work(named, force=True)
    emulator.advance(HEALABLE_SECONDS)
    for _ in range(LATEST_PER_SWEEP + 400):
        finish(emulator)
    emulator.advance(HEALABLE_SECONDS)
    healer = Healer(world.client, settings_for(emulator))
    for number in range(1000):
        healer.hint(f"sesn_{number}")
    healer.hint(named)
    looks = []
    for _ in range(LOOKS_PER_HINT + 1):
        items = await healer.list_work()
        assert items is not None
        looks.append(named in [item.data.id for item in healer._candidates(items)[:1]])
    assert looks == [True] * LOOKS_PER_HINT + [False]
    assert len(healer._hints) == 0


async def test_one_session_that_cannot_be_read_delays_no_other(
    world: World, detour: Detour, caplog: pytest.LogCaptureFixture
) -> None:
    first = await world.strand()
    second = await world.strand()
    detour.changes.append(
        lambda request, _: httpx2.Response(403, json={}) if f"/sessions/{first}/" in request.url.path else None
    )
    await world.dispatcher.sweep()
    assert world.results(first) == []
    assert world.results(second) == [(LOST, True)]
    assert f"action=heal session={first}" in caplog.text


async def test_a_429_ends_the_looking(world: World, detour: Detour) -> None:
    for _ in range(5):
        finish(world.emulator)
    world.emulator.advance(HEALABLE_SECONDS)
    slow_down = {"retry-after-ms": "1"}
    detour.changes.append(
        lambda request, _: httpx2.Response(429, headers=slow_down) if request.url.path.endswith("/events") else None
    )
    await world.dispatcher.sweep()
    assert count(world.emulator, "events.list") == 1 + 2  # the SDK's own retries


async def test_work_that_cannot_be_listed_is_for_the_next_sweep(world: World, detour: Detour) -> None:
    session = await world.strand()
    detour.changes.append(
        lambda request, _: httpx2.Response(403, json={}) if request.url.path.endswith("/work") else None
    )
    await world.dispatcher.sweep()
    assert world.results(session) == []
    detour.changes.clear()
    await world.dispatcher.sweep()
    assert world.results(session) == [(LOST, True)]
