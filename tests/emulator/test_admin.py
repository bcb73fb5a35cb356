"""The admin API through its client: the same effects as in Python, and refusals that name what is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from tests.emulator.support import bearer, result, work_path
from tests.emulator.test_webhooks import Receiver, receiver
from tools.emulator import AdminClient, AdminError, Emulator, Switches
from tools.emulator.admin import TABLE

__all__ = ["receiver"]  # a fixture


@pytest.fixture
def admin(emulator: Emulator) -> Iterator[AdminClient]:
    with AdminClient(emulator.url) as admin:
        yield admin


# The same effects


def test_the_state_has_what_the_ready_line_has(emulator: Emulator, admin: AdminClient) -> None:
    state = admin.state()
    for name in ("url", "environment_id", "environment_key", "api_key", "webhook_key", "agent_id"):
        assert state[name] == getattr(emulator, name)
    assert state["switches"] == asdict(Switches())
    assert state["sessions"] == []


def test_a_whole_turn_by_the_client_alone(emulator: Emulator, admin: AdminClient) -> None:
    session_id = admin.create_session("by admin")
    admin.set_script(session_id, [{"bash": "date"}, {"expect": {"equals": "noon"}}, {"say": "It is noon."}, "end"])
    admin.say(session_id, "What time is it?")
    admin.wait_for(session_id, "requires_action")
    (call_id,) = admin.pending_calls(session_id)
    admin.send(session_id, result(call_id, "noon"))
    admin.wait_idle(session_id)
    assert admin.events(session_id, "agent.message")[0]["content"][0]["text"] == "It is noon."
    assert admin.session(session_id) | {"stats": None} == emulator.session(session_id) | {"stats": None}
    assert admin.work(session_id) == emulator.work(session_id)
    assert admin.failed_expectations() == []
    assert admin.state()["sessions"] == [session_id]


def test_the_clock(emulator: Emulator, admin: AdminClient) -> None:
    before = admin.now()
    admin.advance(3600)
    assert admin.now() - before >= timedelta(hours=1)
    admin.skew(-60)
    assert emulator.clock.skew == timedelta(seconds=-60)
    assert admin.state()["skew"] == -60


def test_switches(emulator: Emulator, admin: AdminClient) -> None:
    admin.switch(lease_lapse="requeue", stop_reply=204)
    assert (emulator.switches.lease_lapse, admin.switches["stop_reply"]) == ("requeue", 204)


def test_faults_are_armed_listed_and_cleared(emulator: Emulator, admin: AdminClient) -> None:
    admin.fault("work.poll", "fail", count=2, status=503)
    admin.cut_stream("sesn_1", after_events=3)
    admin.webhook_fault("delay", seconds=5)
    with httpx2.Client(base_url=emulator.url) as http:
        assert http.get(work_path(emulator, "/poll"), headers=bearer(emulator.environment_key)).status_code == 503
    assert [(one["on"], one["hits"], one["count"]) for one in admin.faults()] == [
        ("request", 1, 2),
        ("stream", 0, 1),
        ("webhook", 0, 1),
    ]
    (record,) = admin.requests()
    assert record == emulator.requests[0]
    assert admin.requests(since=1) == []
    admin.clear_faults()
    assert admin.faults() == []
    assert emulator.faults() == []


def test_webhooks_are_seen_paused_and_enabled_again(receiver: Receiver) -> None:
    types = ["session.status_run_started"]
    with Emulator(webhook_types=types) as emulator, AdminClient(emulator.url) as admin:
        admin.set_webhook_url(receiver.url)
        receiver.statuses = [302]
        admin.say(admin.create_session(), "hello")
        emulator.wait_until(lambda: emulator.webhook_disabled_reason)
        assert "redirect" in admin.webhooks()["disabled_reason"]
        admin.enable_webhooks()
        admin.pause_webhooks()
        assert admin.webhooks() == {"url": receiver.url, "paused": True, "disabled_reason": None}
        admin.say(admin.create_session(), "unheard")
        admin.pause_webhooks(False)
        heard = admin.create_session()
        admin.say(heard, "hello")
        emulator.wait_until(lambda: len(emulator.deliveries) == 2)
        assert admin.deliveries() == emulator.deliveries
        assert admin.deliveries(since=1)[0].session_id == heard
        admin.set_webhook_url(None)
        assert emulator.webhook_url is None


def test_the_queue(emulator: Emulator, admin: AdminClient) -> None:
    item = admin.add_healthcheck()
    assert item["data"]["type"] == "healthcheck"
    environment_id, key = admin.create_environment("second")
    session_id = admin.create_session(environment_id=environment_id)
    assert admin.stop_work(session_id)["state"] == "stopped"
    with httpx2.Client(base_url=emulator.url) as http:
        assert http.get(f"/v1/environments/{environment_id}/work/poll", headers=bearer(key)).json() is None
    assert emulator.stats()["depth"] == 1


def test_executions(emulator: Emulator, admin: AdminClient) -> None:
    session_id = admin.create_session()
    admin.report_execution("bash", "runner-1", session_id, lease_epoch=3)
    reported = admin.report_execution("bash", "runner-2")
    assert admin.executions() == emulator.executions
    assert admin.executions(since=1) == [reported]
    assert [(one.runner, one.lease_epoch, one.actual_epoch) for one in emulator.executions] == [
        ("runner-1", 3, 0),
        ("runner-2", None, None),
    ]


def test_a_default_script_is_for_the_sessions_to_come(emulator: Emulator, admin: AdminClient) -> None:
    admin.set_default_script([{"say": "scripted"}, "end"])
    session_id = admin.create_session()
    admin.say(session_id, "go")
    assert admin.events(session_id, "agent.message")[0]["content"][0]["text"] == "scripted"


# Waiting


def test_a_wait_is_woken_by_a_change(emulator: Emulator, admin: AdminClient) -> None:
    session_id = admin.create_session()
    thread = threading.Thread(target=lambda: emulator.stop_work(session_id))
    thread.start()
    admin.wait_for(session_id, "stopped", timeout=60)
    thread.join()


def test_a_wait_ends_with_a_timeout(admin: AdminClient) -> None:
    with pytest.raises(TimeoutError, match=r"was not active within 0\.05 s"):
        admin.wait_for(admin.create_session(), "active", timeout=0.05)


# Refusals


@pytest.mark.parametrize(
    ("method", "path", "body", "complaint"),
    [
        ("POST", "/faults", {"operation": "work.acks", "kind": "drop"}, "400: operation: 'work.acks' is not one of"),
        ("POST", "/faults", {"operation": "work.ack", "kind": "explode"}, "400: kind: Input should be"),
        ("POST", "/faults", {"operation": "work.ack", "kind": "delay"}, "400: seconds: delay needs"),
        ("POST", "/faults", {"operation": "work.ack", "kind": "drop", "often": 1}, "400: often: not a body field"),
        ("POST", "/stream-cuts", {"after_events": -1}, "400: after_events"),
        ("POST", "/webhook-faults", {"kind": "lose", "count": 0}, "400: count"),
        ("POST", "/faults", {"operation": "*", "kind": "delay", "seconds": 1e300}, "400: seconds: 1e+300 is not"),
        ("POST", "/webhook-faults", {"kind": "delay", "seconds": 1e300}, "400: seconds: 1e+300 is not"),
        ("POST", "/clock", {"advance": -1}, "400: the clock only goes forward"),
        ("POST", "/clock", {"advance": 1e12}, "400: advance: "),
        ("POST", "/clock", {"advance": 1e9, "skew": 60}, "400: advance: "),
        ("POST", "/clock", {"advance": 60, "skew": 1e12}, "400: skew: "),
        ("POST", "/script", {"steps": [{"sleep": 1e300}]}, "400: steps.0.sleep: 1e+300 is not"),
        ("POST", "/switches", {"gravity": 1}, "400: gravity: not a switch"),
        ("POST", "/webhooks", {"url": "ftp://x"}, "400: webhook URL 'ftp://x'"),
        ("POST", "/webhooks", {"enabled": False}, "400: enabled: "),
        ("POST", "/script", {"steps": [{"shout": "x"}]}, "400: steps.0: 'shout' is not a step"),
        ("POST", "/healthchecks", {"environment_id": "env_gone"}, "404: environment env_gone"),
        ("POST", "/sessions/sesn_gone/stop", {}, "404: session sesn_gone"),
        ("GET", "/sessions/sesn_gone", None, "404: session sesn_gone"),
        ("GET", "/requests?since=-1", None, "400: since: "),
        ("GET", "/everything", None, "404: GET /_emulator/everything is not an endpoint"),
    ],
)
def test_a_refusal_names_what_is_wrong_and_changes_nothing(
    emulator: Emulator, admin: AdminClient, method: str, path: str, body: Any, complaint: str
) -> None:
    with pytest.raises(AdminError) as refusal:
        admin._request(method, path, **({} if body is None else {"json": body}))
    assert str(refusal.value).startswith(complaint)
    assert emulator.faults() == []
    assert (emulator.clock.advanced, emulator.clock.skew) == (timedelta(), timedelta())


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_refused_and_changes_nothing(emulator: Emulator, seconds: str) -> None:
    """JSON has none of these, Python's reader takes them."""
    headers = {"content-type": "application/json"}
    bodies = {
        "faults": f'{{"operation": "*", "kind": "delay", "seconds": {seconds}, "count": null}}',
        "webhook-faults": f'{{"kind": "delay", "seconds": {seconds}}}',
        "clock": f'{{"skew": {seconds}}}',
    }
    with httpx2.Client(base_url=emulator.url) as http:
        for path, body in bodies.items():
            assert http.post(f"/_emulator/{path}", content=body, headers=headers).status_code == 400, path
        assert http.post("/_emulator/clock", content=f'{{"advance": {seconds}}}', headers=headers).status_code == 400
    assert emulator.faults() == []
    assert (emulator.clock.advanced, emulator.clock.skew) == (timedelta(), timedelta())


def test_the_clock_goes_ten_years_ahead_in_all(admin: AdminClient) -> None:
    admin.advance(9 * 365 * 86400)
    with pytest.raises(AdminError, match="within ten years"):
        admin.advance(2 * 365 * 86400)
    admin.create_session()


@pytest.mark.parametrize(
    "text",
    [rb'"\ud800"', rb'"\uDFFF pair"', b'"\xed\xa0\x80"', rb'{"command": "\ud83d"}'],
    ids=["high", "low", "raw", "below"],
)
def test_half_of_a_surrogate_pair_is_refused_where_it_comes_in(emulator: Emulator, text: bytes) -> None:
    """No answer could carry it: the session would be served with 500s."""
    session_id = emulator.create_session()
    headers = {"content-type": "application/json", "authorization": f"Bearer {emulator.api_key}"}
    headers["anthropic-beta"] = "managed-agents-2026-04-01"
    with httpx2.Client(base_url=emulator.url, headers=headers) as http:
        for path, before, after in (
            (f"/_emulator/sessions/{session_id}/script", b'{"steps": [{"call": {"bash": ', b"}}]}"),
            (f"/v1/sessions/{session_id}/events", b'{"events": [{"type": "user.message", "content": ', b"}]}"),
        ):
            response = http.post(path, content=before + text + after)
            assert response.status_code == 400
            assert "surrogate" in response.json()["error"]["message"]
        whole = http.post(f"/_emulator/sessions/{session_id}/script", content=rb'{"steps": [{"say": "\ud83d\ude00"}]}')
        assert whole.status_code == 200


def test_a_web_page_cannot_post_to_it(emulator: Emulator) -> None:
    """What a browser sends across origins without asking first is a form or plain text."""
    with httpx2.Client(base_url=emulator.url) as http:
        for content_type in ("text/plain", "application/x-www-form-urlencoded"):
            headers = {"content-type": content_type}
            response = http.post("/_emulator/clock", content='{"advance": 60}', headers=headers)
            assert response.status_code == 400
            assert "application/json" in response.json()["error"]["message"]


def test_admin_requests_are_not_logged(emulator: Emulator, admin: AdminClient) -> None:
    admin.state()
    admin.switch()
    assert emulator.requests == []


def test_every_route_of_the_table_answers(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    with httpx2.Client(base_url=emulator.url) as http:
        for method, path, _ in TABLE:
            if path.endswith("/live"):
                continue  # never ends: test_page_served.py
            fault = emulator.fault("work.ack", "drop")
            query = {"until": "idle", "timeout": "0.05"} if path.endswith("/wait") else {}
            response = http.request(method, path.format(session_id=session_id, fault_id=fault.id), params=query)
            assert response.status_code in (200, 400), path  # a body may be missing, a route may not
