"""Random histories under every combination of switches, with two workers whose requests are lost, doubled and late."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from tools.emulator import Switches, call, end, say, sleep, tools
from tools.emulator.agents import Step
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
from tools.emulator.state.work import NO_HEARTBEAT, WorkItem
from tools.emulator.switches import values_of

START = datetime(2026, 11, 23, 12, tzinfo=UTC)
MESSAGE = UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": "x"}]})
SCRIPT: list[Step] = [tools(call("bash", command="a"), call("bash", command="b")), sleep(5), say("done"), end()]
STEP = timedelta(milliseconds=100)

Fate = Literal["delivered", "lost", "doubled", "late"]
"""Of a request: the response comes, is lost on the way back, the request comes twice, or after the next one."""

switches = st.builds(Switches, **{name: st.sampled_from(values) for name, values in values_of().items()})
worker_steps = st.tuples(
    st.integers(0, 1),
    st.sampled_from(["poll", "ack", "claim", "beat", "beat", "answer", "stop"]),
    st.sampled_from(["delivered", "delivered", "delivered", "lost", "doubled", "late"]),
)
others_steps = st.tuples(
    st.just(None),
    st.sampled_from(["message", "interrupt", "stop", "force", "wait", "long wait", "healthcheck"]),
    st.just("delivered"),
)


class History:
    """A world with one session, and what each of two workers believes."""

    def __init__(self, facts: Switches) -> None:
        self.world = World(facts, timedelta(seconds=300), lambda *_: None, START)
        config = SelfHosted(type="self_hosted")
        environment = self.world.create_environment(EnvironmentCreateBody(name="e", config=config), START)
        agent = self.world.create_agent(AgentCreateBody(name="a", model="m"), START)
        self.world.default_script = SCRIPT * 30
        self.session = self.world.create_session(
            SessionCreateBody(agent=agent.id, environment_id=environment.id), START
        )
        self.queue = environment.queue
        self.now = START
        self.beats = ["", ""]
        """The last beat that each worker knows of; empty when it holds nothing."""
        self.holders: dict[int, set[int]] = {}
        """Who has extended each lease."""
        self.late: list[Callable[[], object]] = []

    @property
    def item(self) -> WorkItem:
        item = self.queue.of_session(self.session.id)
        assert item is not None
        return item

    def go(self, worker: int | None, action: str, fate: Fate) -> None:
        self.now += STEP
        self.world.tick(self.now)
        waiting, self.late = self.late, []
        request = self._request(worker, action)
        if fate == "late":
            self.late.append(request)
        else:
            answer = self._attempt(request)
            if fate == "doubled":
                answer = self._attempt(request)
            if worker is not None:
                self._learn(worker, action, answer if fate != "lost" else None)
        for each in waiting:
            self._attempt(each)  # its sender has long given up: nobody learns the answer

    def _attempt(self, request: Callable[[], object]) -> object:
        before = dataclasses.asdict(self.item)
        try:
            return request()
        except EmulatorError as refusal:
            assert dataclasses.asdict(self.item) == before  # a refusal changes nothing
            return refusal

    def _learn(self, worker: int, action: str, answer: object) -> None:
        if action in ("claim", "beat"):
            self.beats[worker] = answer if isinstance(answer, str) else ""
        elif action in ("stop", "poll"):
            self.beats[worker] = ""

    def _request(self, worker: int | None, action: str) -> Callable[[], object]:
        """The request with what its sender knows now, to be carried out now or later."""
        world, queue, session_id, item_id = self.world, self.queue, self.session.id, self.item.id
        known = self.beats[worker] if worker is not None else ""
        answers: list[Any] = [
            UserToolResult(type="user.tool_result", tool_use_id=i) for i in self.session.pending_ids()
        ]
        interrupt = UserInterrupt(type="user.interrupt")

        def beat(expected: str) -> str:
            is_extended = queue.heartbeat(item_id, self.now, expected, None)
            assert is_extended == (self.item.state == "active")
            if is_extended and worker is not None:
                self.holders.setdefault(self.item.epoch, set()).add(worker)
            return self.item.last_heartbeat or ""

        def stop(force: bool) -> None:
            world.stopped(queue.stop(item_id, self.now, force=force), self.now)

        match action:
            case "poll":
                return lambda: world.hand_out(queue.environment_id, timedelta(seconds=5), self.now)
            case "ack":
                return lambda: queue.ack(item_id, self.now)
            case "claim":
                return lambda: beat(NO_HEARTBEAT)
            case "beat":
                return lambda: beat(known or "lost")
            case "answer":
                return lambda: world.send(session_id, answers[:1], self.now) if answers else None
            case "stop" | "force":
                return lambda: stop(action == "force" or worker is not None)
            case "message":
                return lambda: world.send(session_id, [MESSAGE], self.now)
            case "interrupt":
                return lambda: world.send(session_id, [interrupt], self.now)
            case "healthcheck":
                return lambda: queue.add_healthcheck(self.now)
            case _:
                return lambda: self._wait(6 if action == "wait" else 400)

    def _wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.world.tick(self.now)

    def check(self) -> None:
        item = self.item
        of_session = [each for each in self.queue.newest_first() if each.session_id == self.session.id]
        assert of_session == [item]  # never two items, so never two live ones
        stamps = [item.created_at, item.started_at, item.acknowledged_at, item.latest_heartbeat_at]
        known = [each for each in stamps if each is not None]
        assert known == sorted(known)
        if item.stopped_at is not None:
            assert item.stop_requested_at is not None
            assert known[-1] <= item.stop_requested_at <= item.stopped_at
        assert (item.stopped_at is not None) == (item.state == "stopped")
        if item.state == "queued":
            assert item.acknowledged_at is item.latest_heartbeat_at is item.stop_requested_at is None
        assert all(len(workers) == 1 for workers in self.holders.values())  # a lease has one holder
        processed = [event["processed_at"] for event in self.session.log]
        assert processed == sorted(set(processed))
        results = [event["tool_use_id"] for event in self.session.log if event["type"] == "user.tool_result"]
        assert len(results) == len(set(results))  # what is ignored leaves no trace


@settings(max_examples=150, deadline=None)
@given(facts=switches, steps=st.lists(worker_steps | others_steps, max_size=50))
def test_no_switch_and_no_fault_breaks_the_rules(facts: Switches, steps: list[tuple[int | None, str, Fate]]) -> None:
    history = History(facts)
    for step in steps:
        history.go(*step)
        history.check()
