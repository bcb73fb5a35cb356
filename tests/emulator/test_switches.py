"""Every switch in each of its positions, as a client meets it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.emulator.support import bearer, result, work_path
from tools.emulator import Emulator, Switches, call, end, say, tools
from tools.emulator.errors import EmulatorError, Invalid
from tools.emulator.switches import parse_switch, values_of


class Worker:
    """The work endpoints with the environment key."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        headers = bearer(emulator.environment_key) | {"anthropic-beta": "managed-agents-2026-04-01"}
        self.http = httpx2.Client(base_url=emulator.url, headers=headers)

    def poll(self, **query: int) -> Any:
        return self.http.get(work_path(self.emulator, "/poll"), params=query).json()

    def post(self, work_id: str, operation: str, **body: Any) -> httpx2.Response:
        return self.http.post(work_path(self.emulator, f"/{work_id}/{operation}"), json=body)

    def claim(self) -> str:
        """A new session whose item is active."""
        session_id = self.emulator.create_session()
        self.poll()
        self.post(session_id, "ack")
        self.post(session_id, "heartbeat")
        return session_id

    def status_with(self, token: str, session_id: str) -> int:
        return self.http.get(f"/v1/sessions/{session_id}", headers=bearer(token)).status_code


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Emulator() as emulator:
        worker = Worker(emulator)
        yield worker
        worker.http.close()


def stranded(emulator: Emulator) -> str:
    """A session that waits for a call while its item is stopped."""
    session_id = emulator.create_session()
    emulator.set_script(session_id, [tools(call("bash", command="true")), end(), say("again"), end()])
    emulator.say(session_id, "go")
    emulator.stop_work(session_id, force=True)
    return session_id


# The object


def test_a_value_no_server_has_is_named() -> None:
    with pytest.raises(ValueError, match="lease_lapse: 'explode' is not one of 'stop', 'requeue', 'never'"):
        Switches(lease_lapse="explode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gravity: not a switch; there are credentials"):
        Switches().change({"gravity": 1})
    with pytest.raises(ValueError, match="ack_on_claimed: True"):
        Switches().change({"ack_on_claimed": True})


def test_all_values_or_none() -> None:
    switches = Switches()
    with pytest.raises(ValueError, match="stop_reply"):
        switches.change({"lease_lapse": "requeue", "stop_reply": 500})
    assert switches == Switches()


def test_every_value_can_be_spelled_on_a_command_line() -> None:
    for name, values in values_of().items():
        for value in values:
            assert parse_switch(f"{name}={value}") == (name, value)
    assert parse_switch("environment_key_may_answer=false") == ("environment_key_may_answer", False)
    for text in ("lease_lapse", "lease_lapse=", "gravity=1"):
        with pytest.raises(ValueError, match=r"not NAME=VALUE|is not one of"):
            parse_switch(text)


def test_an_emulator_keeps_a_copy_of_its_own() -> None:
    mine = Switches()
    emulator = Emulator(switches=mine)
    emulator.switch(stop_reply=204)
    assert (emulator.switches.stop_reply, mine.stop_reply) == (204, 200)
    mine.change({"lease_lapse": "requeue"})
    assert emulator.switches.lease_lapse == "stop"


# Ack and the lease


@pytest.mark.parametrize("status", [200, 409])
def test_ack_on_a_claimed_item(worker: Worker, status: int) -> None:
    worker.emulator.switch(ack_on_claimed=status)
    session_id = worker.claim()
    before = worker.emulator.work(session_id)
    assert worker.post(session_id, "ack").status_code == status
    assert worker.emulator.work(session_id) == before


@pytest.mark.parametrize("status", [404, 409])
def test_ack_on_a_stopped_item(worker: Worker, status: int) -> None:
    worker.emulator.switch(ack_on_stopped=status)
    session_id = worker.emulator.create_session()
    worker.emulator.stop_work(session_id)
    assert worker.post(session_id, "ack").status_code == status


@pytest.mark.parametrize(("value", "state"), [("lapse", "stopped"), ("frozen", "starting")])
def test_acknowledged_and_never_beaten(worker: Worker, value: str, state: str) -> None:
    worker.emulator.switch(never_beaten=value)
    session_id = worker.emulator.create_session()
    worker.poll()
    worker.post(session_id, "ack")
    worker.emulator.advance(3600)
    assert worker.emulator.work(session_id)["state"] == state


def test_a_frozen_item_lapses_like_any_other_once_it_has_beaten(worker: Worker) -> None:
    worker.emulator.switch(never_beaten="frozen")
    session_id = worker.claim()
    worker.emulator.advance(361)
    assert worker.emulator.work(session_id)["state"] == "stopped"


# Hand-out


def token_of(secret: str) -> str:
    token: str = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))["sessions_token"]
    return token


@pytest.mark.parametrize(
    ("value", "is_same", "old_status"), [("fresh", False, 200), ("fresh_only", False, 401), ("same", True, 200)]
)
def test_a_second_hand_out(worker: Worker, value: str, is_same: bool, old_status: int) -> None:
    worker.emulator.switch(repeated_secret=value)
    session_id = worker.emulator.create_session()
    first = token_of(worker.poll()["secret"])
    second = token_of(worker.poll(reclaim_older_than_ms=0)["secret"])
    assert (first == second) == is_same
    assert (worker.status_with(first, session_id), worker.status_with(second, session_id)) == (old_status, 200)


def test_a_hand_out_after_a_stop_is_not_a_repeated_one(worker: Worker) -> None:
    worker.emulator.switch(repeated_secret="same")
    session_id = worker.emulator.create_session()
    first = worker.poll()["secret"]
    worker.emulator.stop_work(session_id)
    worker.emulator.say(session_id, "again")
    assert worker.poll()["secret"] != first


@pytest.mark.parametrize("may", [True, False])
def test_skills_with_a_sessions_token(worker: Worker, may: bool) -> None:
    worker.emulator.switch(sessions_token_may_read_skills=may)
    skill_id = worker.emulator.add_skill("greeting", {"SKILL.md": "---\nname: greeting\ndescription: Greets.\n---\n"})
    worker.emulator.create_session(skills=[skill_id])
    token = token_of(worker.poll()["secret"])
    path = f"/v1/skills/{skill_id}/versions/latest"
    assert worker.http.get(path, headers=bearer(token)).status_code == (200 if may else 403)
    assert worker.http.get(path).status_code == 200  # the environment key may


# Stop


@pytest.mark.parametrize("status", [200, 204])
def test_what_a_stop_answers(worker: Worker, status: int) -> None:
    worker.emulator.switch(stop_reply=status)
    reply = worker.post(worker.claim(), "stop", force=True)
    assert reply.status_code == status
    assert bool(reply.content) == (status == 200)


@pytest.mark.parametrize(("value", "is_equal"), [("equal", True), ("different", False)])
def test_both_stamps_of_a_force_stop(worker: Worker, value: str, is_equal: bool) -> None:
    worker.emulator.switch(force_stop_stamps=value)
    item = worker.post(worker.claim(), "stop", force=True).json()
    assert (item["stopped_at"] == item["stop_requested_at"]) == is_equal
    assert item["stopped_at"] >= item["stop_requested_at"]


@pytest.mark.parametrize("value", ["kept", "new"])
def test_created_at_after_a_requeue(value: str) -> None:
    emulator = Emulator()
    emulator.switch(created_at_after_requeue=value)
    session_id = emulator.create_session()
    before = emulator.work(session_id)["created_at"]
    emulator.stop_work(session_id)
    emulator.advance(60)
    emulator.say(session_id, "again")
    assert (emulator.work(session_id)["created_at"] == before) == (value == "kept")


# Messages and answers


@pytest.mark.parametrize("value", ["queues", "400"])
def test_a_message_to_a_stranded_session(value: str) -> None:
    emulator = Emulator()
    emulator.switch(message_to_stranded_session=value)
    session_id = stranded(emulator)
    if value == "queues":
        emulator.say(session_id, "hello?")
        assert emulator.work(session_id)["state"] == "queued"
        return
    before = emulator.events(session_id)
    with pytest.raises(Invalid, match=emulator.pending_calls(session_id)[0]):
        emulator.say(session_id, "hello?")
    assert emulator.events(session_id) == before
    message = {"type": "user.message", "content": [{"type": "text", "text": "again"}]}
    emulator.send(session_id, {"type": "user.interrupt"}, message)  # the cure
    assert emulator.work(session_id)["state"] == "queued"


def test_only_a_stranded_session_refuses_messages() -> None:
    emulator = Emulator(switches=Switches(message_to_stranded_session="400"))
    dormant, busy = emulator.create_session(), emulator.create_session()
    emulator.stop_work(dormant)
    emulator.say(dormant, "hello")
    emulator.say(busy, "!true")
    emulator.say(busy, "!true")
    assert len(emulator.events(busy, "user.message")) == 2


def test_an_interrupt_may_close_the_open_calls() -> None:
    emulator = Emulator(switches=Switches(interrupted_call="closed"))
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    (call_id,) = emulator.pending_calls(session_id)
    with pytest.raises(Invalid, match="not an open call"):  # nothing of a refused request happens
        emulator.send(session_id, {"type": "user.interrupt"}, result(call_id))
    assert emulator.pending_calls(session_id) == [call_id]
    emulator.send(session_id, {"type": "user.interrupt"})
    (closing,) = emulator.events(session_id, "agent.tool_result")
    assert (closing["tool_use_id"], closing["is_error"]) == (call_id, True)
    with pytest.raises(Invalid, match="not an open call"):
        emulator.send(session_id, result(call_id))


def test_a_result_for_a_closed_call_may_be_ignored() -> None:
    emulator = Emulator(switches=Switches(interrupted_call="closed", result_for_closed_call=200))
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    (call_id,) = emulator.pending_calls(session_id)
    emulator.send(session_id, {"type": "user.interrupt"})
    before = emulator.events(session_id)
    (echo,) = emulator.send(session_id, result(call_id))
    assert echo["processed_at"] is not None
    assert emulator.events(session_id) == before
    with pytest.raises(Invalid, match="not an open call"):
        emulator.send(session_id, result("sevt_unknown"))


@pytest.mark.parametrize("status", [400, 200])
def test_a_duplicate_result(status: int) -> None:
    emulator = Emulator()
    emulator.switch(duplicate_tool_result=status)
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    (call_id,) = emulator.pending_calls(session_id)

    def post(*results: dict[str, Any]) -> int:
        try:
            emulator.send(session_id, *results)
        except EmulatorError:
            return 400
        return 200

    assert post(result(call_id), result(call_id)) == status
    if status == 400:
        emulator.send(session_id, result(call_id))
    assert post(result(call_id)) == status
    assert len(emulator.events(session_id, "user.tool_result")) == 1
    assert len(emulator.events(session_id, "agent.message")) == 1
