"""Webhooks that are lost, late, double or out of order, and an endpoint enabled again."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from anthropic import Anthropic
from standardwebhooks import WebhookVerificationError

from tests.emulator.test_webhooks import Receiver, delivered, emulator, receiver
from tools.emulator import Emulator

__all__ = ["emulator", "receiver"]  # fixtures


def said(emulator: Emulator, count: int) -> list[str]:
    """So many new sessions, each with one webhook."""
    sessions = [emulator.create_session() for _ in range(count)]
    for session_id in sessions:
        emulator.say(session_id, "hello")
    return sessions


def heard(receiver: Receiver) -> list[str]:
    return [json.loads(body)["data"]["id"] for _, body in receiver.got]


def test_a_lost_webhook_is_never_sent(emulator: Emulator, receiver: Receiver) -> None:
    fault = emulator.webhook_fault("lose", count=2)
    _, _, third = said(emulator, 3)
    delivered(emulator, 1)
    assert (heard(receiver), fault.hits, emulator.faults()) == ([third], 2, [])


def test_a_delayed_webhook_comes_when_the_clock_says(emulator: Emulator, receiver: Receiver) -> None:
    emulator.webhook_fault("delay", seconds=600)
    late, prompt = said(emulator, 2)
    delivered(emulator, 1)
    assert heard(receiver) == [prompt]
    emulator.advance(601)
    delivered(emulator, 2)
    assert heard(receiver) == [prompt, late]


def test_a_duplicate_has_the_same_id(emulator: Emulator, receiver: Receiver) -> None:
    emulator.webhook_fault("duplicate")
    first, second = said(emulator, 2)
    delivered(emulator, 3)
    assert sorted(heard(receiver)) == sorted([first, first, second])
    ids = {json.loads(body)["data"]["id"]: headers["webhook-id"] for headers, body in receiver.got}
    assert len(set(ids.values())) == 2
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 2


def test_reordered_webhooks_come_after_a_later_one(emulator: Emulator, receiver: Receiver) -> None:
    emulator.webhook_fault("reorder", count=2)
    first, second, third = said(emulator, 3)
    delivered(emulator, 3)
    assert heard(receiver) == [third, second, first]


def test_the_order_holds_when_the_first_attempt_fails(emulator: Emulator, receiver: Receiver) -> None:
    receiver.statuses = [500]
    emulator.webhook_fault("reorder")
    first, second = said(emulator, 2)
    delivered(emulator, 2)
    assert heard(receiver) == [second, first]
    emulator.advance(120)
    delivered(emulator, 3)
    assert heard(receiver) == [second, first, second]


def test_an_endpoint_is_enabled_by_hand(emulator: Emulator, receiver: Receiver) -> None:
    receiver.statuses = [301]
    said(emulator, 1)
    emulator.wait_until(lambda: emulator.webhook_disabled_reason)
    said(emulator, 1)
    emulator.enable_webhooks()
    (after,) = said(emulator, 1)
    delivered(emulator, 2)
    assert heard(receiver)[-1] == after
    assert len(receiver.got) == 2


@pytest.mark.parametrize(("kind", "count", "seconds"), [("explode", 1, 0), ("lose", 0, 0), ("delay", 1, 0)])
def test_a_webhook_fault_that_cannot_be_is_refused(kind: str, count: int, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"kind|count|seconds"):
        Emulator().webhook_fault(kind, count, seconds=seconds)  # type: ignore[arg-type]


@pytest.fixture
def verifier() -> Iterator[Anthropic]:
    with Anthropic(api_key="unused") as client:
        yield client


@pytest.mark.parametrize(("seconds", "is_accepted"), [(120, True), (-120, True), (600, False), (-600, False)])
def test_the_sdk_refuses_a_sender_whose_clock_is_far_off(
    emulator: Emulator, receiver: Receiver, verifier: Anthropic, seconds: float, is_accepted: bool
) -> None:
    emulator.skew(seconds)
    said(emulator, 1)
    delivered(emulator, 1)
    headers, body = receiver.got[0]
    if is_accepted:
        assert verifier.beta.webhooks.unwrap(body, headers=headers, key=emulator.webhook_key).type == "event"
        return
    with pytest.raises(WebhookVerificationError, match="timestamp"):
        verifier.beta.webhooks.unwrap(body, headers=headers, key=emulator.webhook_key)
