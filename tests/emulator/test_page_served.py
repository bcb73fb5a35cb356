"""How the page is served, who may ask for what, and the streams it lives on. No browser."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.emulator.support import error_of, result
from tools.emulator import AdminClient, AdminError, Emulator
from tools.emulator.live import LAST_EVENTS, Detail, Overview
from tools.emulator.pages import FOLDER, TYPES

SCRIPTS = sorted(FOLDER.glob("*.js"))


@pytest.fixture
def web(emulator: Emulator) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=emulator.url, trust_env=False) as web:
        yield web


# The files


def test_the_page_brings_its_policy(web: httpx2.Client) -> None:
    reply = web.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(each.strip().split(" ", 1) for each in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cache-control"] == "no-cache"
    assert "/page/app.js" in reply.text


def test_every_file_is_served_and_nothing_else(web: httpx2.Client) -> None:
    files = [path for path in FOLDER.iterdir() if path.name != "index.html"]
    assert len(files) > 5
    for path in files:
        reply = web.get(f"/page/{path.name}")
        assert (reply.status_code, reply.content) == (200, path.read_bytes())
        assert reply.headers["content-type"] == TYPES[path.suffix]
        assert "content-security-policy" in reply.headers
    for wrong in ("/page/", "/page/index.html", "/page/../pages.py", "/page/%2e%2e/pages.py", "/page/app.js/"):
        assert web.get(wrong).status_code == 404
    assert web.post("/").status_code == 405


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_markup_or_code_of_text(script: Any) -> None:
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc|javascript:|DOMParser"
    assert re.findall(unsafe, script.read_text()) == []


def test_what_a_script_imports_is_there() -> None:
    for script in SCRIPTS:
        for name in re.findall(r'from "\./([^"]+)"', script.read_text()):
            assert (FOLDER / name).is_file(), f"{script.name} imports {name}"


# Strangers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8700", "127.0.0.1.evil.example", "10.0.0.1", "", "["])
def test_a_name_that_is_not_loopbacks_gets_nothing(emulator: Emulator, web: httpx2.Client, host: str) -> None:
    """DNS rebinding: a foreign page whose name now points to this machine."""
    for path in ("/", "/page/app.js", "/_emulator/state", "/_emulator/live"):
        reply = web.get(path, headers={"host": host})
        assert reply.status_code in (400, 403), path
        assert emulator.api_key not in reply.text


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8700", "emulator.localhost"])
def test_names_of_loopback_are_welcome(web: httpx2.Client, host: str) -> None:
    assert web.get("/_emulator/state", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_a_foreign_page_can_do_nothing(emulator: Emulator, web: httpx2.Client, origin: str) -> None:
    """Also what needs no body, which a browser sends for anybody."""
    session_id = emulator.create_session()
    reply = web.post(f"/_emulator/sessions/{session_id}/stop", headers={"origin": origin})
    assert (reply.status_code, error_of(reply)["type"]) == (403, "permission_error")
    assert emulator.is_in(session_id, "queued")
    assert web.post(f"/_emulator/sessions/{session_id}/stop", headers={"origin": emulator.url}).status_code == 200


def test_an_emulator_for_other_machines_has_other_names() -> None:
    with Emulator(host="0.0.0.0") as emulator:  # noqa: S104 - that it listens to more than loopback is the case
        port = emulator.url.rsplit(":", 1)[1]
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as web:
            assert web.get("/", headers={"host": "emulator:8700"}).status_code == 200
            foreign = {"host": "emulator:8700", "origin": "https://evil.example"}
            assert web.get("/_emulator/state", headers=foreign).status_code == 403


# What the page does by the admin API


def test_sessions_are_made_and_told_without_a_trace(emulator: Emulator, web: httpx2.Client) -> None:
    reply = web.post("/_emulator/sessions", json={"title": "By hand", "text": "!ls"}).json()
    session_id = reply["session"]["id"]
    assert (reply["session"]["title"], reply["pending_calls"]) == ("By hand", emulator.pending_calls(session_id))
    sent = web.post(f"/_emulator/sessions/{session_id}/events", json={"events": [{"type": "user.interrupt"}]})
    assert [event["type"] for event in sent.json()["data"]] == ["user.interrupt"]
    wrong = web.post(f"/_emulator/sessions/{session_id}/events", json={"events": [{"type": "user.nothing"}]})
    assert wrong.status_code == 400
    assert web.post("/_emulator/sessions", json={"environment_id": "env_none"}).status_code == 404
    assert web.post("/_emulator/sessions", json={"text": ""}).status_code == 400
    assert len(emulator.session_ids()) == 1
    assert emulator.requests == []


def test_one_fault_is_disarmed(emulator: Emulator) -> None:
    with AdminClient(emulator.url) as admin:
        ids = [admin.fault("work.ack", "drop")["id"], admin.cut_stream()["id"], admin.webhook_fault("lose")["id"]]
        for id_ in ids:
            admin.disarm(id_)
            assert id_ not in [fault["id"] for fault in admin.faults()]
        assert admin.faults() == []
        with pytest.raises(AdminError, match=f"fault {ids[0]} is not armed") as refused:
            admin.disarm(ids[0])
        assert refused.value.status == 404


# The streams


def test_the_overview_is_whole_at_first_and_then_what_has_changed() -> None:
    emulator = Emulator()
    first, second = emulator.create_session("first"), emulator.create_session("second")
    overview = Overview(emulator)
    whole = overview.changes()
    assert [row["id"] for row in whole["sessions"]] == [first, second]
    assert set(whole) == {"sessions", "clock", "environments", "webhooks", "faults", "switches"}
    assert overview.changes() == {}

    emulator.say(second, "!ls")
    (row,) = overview.changes()["sessions"]
    assert (row["id"], row["status"], row["open_calls"], row["waiting_messages"]) == (second, "idle", 1, 0)
    emulator.claim_and_die(second)
    (row,) = overview.changes()["sessions"]
    assert (row["work"]["state"], row["work"]["epoch"]) == ("active", 1)
    assert row["work"]["expires_at"] is not None
    emulator.delete_session(first)
    assert overview.changes()["gone"] == [first]
    emulator.advance(10)
    assert overview.changes()["clock"] == {"advanced": 10.0, "skew": 0.0}
    emulator.switch(lease_lapse="requeue")
    assert overview.changes()["switches"]["lease_lapse"] == "requeue"
    emulator.fault("work.ack", "drop")
    assert [fault["kind"] for fault in overview.changes()["faults"]] == ["drop"]
    emulator.add_healthcheck()
    (environment,) = overview.changes()["environments"]
    assert [item["state"] for item in environment["healthchecks"]] == ["queued"]
    assert overview.changes() == {}


def test_a_session_has_every_event_once_a_change() -> None:
    emulator = Emulator()
    session_id = emulator.create_session()
    emulator.say(session_id, "!first")
    emulator.say(session_id, "!second")
    detail = Detail(emulator, session_id)
    message = detail.changes()
    assert [event["id"] for event in message["events"]] == [event["id"] for event in emulator.events(session_id)]
    assert message["events"][-1]["processed_at"] is None  # the second message waits
    assert [call["name"] for call in message["calls"]] == ["bash"]
    assert detail.changes() == {}
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0]))
    fresh = detail.changes()
    ids = [event["id"] for event in fresh["events"]]
    assert len(ids) == len(set(ids))
    processed = next(event for event in fresh["events"] if event["id"] == message["events"][-1]["id"])
    assert processed["processed_at"] is not None
    emulator.delete_session(session_id)
    assert detail.changes()["is_deleted"]


def test_a_long_history_is_shown_from_its_end() -> None:
    emulator = Emulator()
    session_id = emulator.create_session()
    while len(emulator.events(session_id)) <= LAST_EVENTS + 100:
        emulator.say(session_id, "hello")
    message = Detail(emulator, session_id).changes()
    assert len(message["events"]) == LAST_EVENTS
    assert message["events_left_out"] == len(emulator.events(session_id)) - LAST_EVENTS
    assert message["events"][-1]["id"] == emulator.events(session_id)[-1]["id"]


def messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))


def test_the_streams_over_http(emulator: Emulator, web: httpx2.Client) -> None:
    """A change is there at once; a stream ends with its session and with the emulator."""
    session_id = emulator.create_session()
    with (
        web.stream("GET", "/_emulator/live") as live,
        web.stream("GET", f"/_emulator/sessions/{session_id}/live") as one,
    ):
        assert live.headers["content-type"].startswith("text/event-stream")
        assert live.headers["cache-control"] == "no-store"
        overview, detail = messages(live.iter_lines()), messages(one.iter_lines())
        assert len(next(overview)["sessions"]) == 1
        assert next(detail)["session"]["id"] == session_id
        emulator.say(session_id, "!ls")
        assert next(overview)["sessions"][0]["open_calls"] == 1
        assert next(detail)["calls"][0]["name"] == "bash"
        emulator.fault("work.ack", "drop")  # from this thread, which rings no bell
        assert next(overview)["faults"][0]["kind"] == "drop"
        emulator.delete_session(session_id)
        assert list(detail)[-1]["is_deleted"]
        assert next(overview)["gone"] == [session_id]
        stopping = threading.Thread(target=emulator.stop)
        stopping.start()
        assert list(overview) == []
        stopping.join()
    assert emulator.requests == []


def test_a_session_that_does_not_exist_has_no_stream(web: httpx2.Client) -> None:
    reply = web.get("/_emulator/sessions/sesn_none/live")
    assert (reply.status_code, error_of(reply)["message"]) == (404, "session sesn_none not found")
