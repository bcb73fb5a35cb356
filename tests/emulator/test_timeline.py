"""When a session got where, in rounds."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from tests.emulator.support import result
from tests.emulator.test_webhooks import Receiver, receiver
from tools.emulator import Delivery, Emulator, Switches
from tools.emulator.timeline import rounds

__all__ = ["receiver"]  # a fixture


def told(emulator: Emulator, session_id: str, deliveries: list[Delivery] | None = None) -> list[dict[str, Any]]:
    session = emulator._world.session(session_id)
    item = emulator._world.queue(session.environment_id).of_session(session_id)
    return rounds(session, item, deliveries or [])


def steps(round_: dict[str, Any]) -> list[tuple[str, int]]:
    """Names, and whole seconds since the round began."""
    return [(step["name"], round(step["ms"] / 1000)) for step in round_["steps"]]


def test_two_rounds_with_their_times() -> None:
    emulator = Emulator()
    session_id = emulator.create_session()
    emulator.advance(2)
    emulator.say(session_id, "!ls")
    emulator.advance(3)
    emulator.claim_and_die(session_id)
    emulator.advance(1)
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0]))
    emulator.advance(60)
    emulator.stop_work(session_id)
    emulator.stop_work(session_id, force=True)
    emulator.advance(1000)
    emulator.say(session_id, "!pwd")
    first, second = told(emulator, session_id)
    assert steps(first) == [
        ("created", 0),
        ("first tool", 2),
        ("reserved", 5),
        ("acked", 5),
        ("claimed", 5),
        ("first result", 6),
        ("idle", 6),
        ("stopping", 66),
        ("stopped", 66),
    ]
    assert steps(second) == [("queued", 0), ("first tool", 0)]


def test_a_lapse_and_an_item_that_is_reserved_again_and_again() -> None:
    emulator = Emulator(switches=Switches(lease_lapse="requeue"))
    session_id = emulator.create_session()
    for _ in range(3):
        emulator._world.hand_out(emulator.environment_id, timedelta(seconds=5), emulator.now())
        emulator.advance(6)
    (only,) = told(emulator, session_id)
    assert [(step["name"], step["note"]) for step in only["steps"]] == [
        ("created", ""),
        ("reserved", "3 times, this was the first"),
    ]
    emulator.claim_and_die(session_id)
    emulator.advance(400)
    lapsed, queued = told(emulator, session_id)
    assert [(step["name"], step["is_bad"]) for step in lapsed["steps"]][-1] == ("lapsed", True)
    assert steps(queued) == [("queued", 0)]


def test_the_webhook_is_the_first_that_was_taken(receiver: Receiver) -> None:
    receiver.statuses = [500]
    with Emulator(webhook_url=receiver.url) as emulator:
        session_id = emulator.create_session()
        emulator.say(session_id, "!ls")
        emulator.wait_until(lambda: len([each for each in emulator.deliveries if each.status == 500]) == 1)
        emulator.advance(20)
        emulator.wait_until(lambda: len(emulator.deliveries) == 3)
        started = [each for each in emulator.deliveries if each.type == "session.status_run_started"]
        others = [each for each in emulator.deliveries if each.type != "session.status_run_started"]
        assert webhook(
            emulator, session_id, [replace(each, status=None, error="ConnectError") for each in started]
        ) == (
            True,
            "ConnectError",
        )
        assert webhook(emulator, session_id, started + others) == (False, "204")
        assert "webhook" not in dict(steps(told(emulator, session_id, others)[0]))


def webhook(emulator: Emulator, session_id: str, deliveries: list[Delivery]) -> tuple[bool, str]:
    """Whether it is bad news, and the answer."""
    step = next(step for step in told(emulator, session_id, deliveries)[0]["steps"] if step["name"] == "webhook")
    return step["is_bad"], step["note"].split(": ")[1].split(" after")[0]


def test_a_session_whose_item_is_gone_has_no_rounds() -> None:
    emulator = Emulator()
    session_id = emulator.create_session()
    session = emulator._world.session(session_id)
    emulator.delete_session(session_id)
    assert rounds(session, None, []) == []
