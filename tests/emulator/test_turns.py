"""Turns of the scripted and the shell-like agent: what waits, what resolves it, what an interrupt leaves behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.support import client_of, custom_result, idles, result, serving, types_of, worker_for
from tools.emulator import Emulator, ToolResult, call, custom, end, error, repeat_output, say, sleep, tools
from tools.emulator.agents import Results, Say, Step
from tools.emulator.errors import Invalid


def message(text: str) -> dict[str, Any]:
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def said(emulator: Emulator, session_id: str) -> list[str]:
    return [event["content"][0]["text"] for event in emulator.events(session_id, "agent.message")]


@pytest.fixture
def emulator() -> Emulator:
    """Not started: these rules need no server."""
    return Emulator()


def scripted(emulator: Emulator, *steps: Step) -> str:
    session_id = emulator.create_session()
    emulator.set_script(session_id, steps)
    return session_id


# The shell-like agent


def test_plain_text_gets_one_line(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "hello")
    assert said(emulator, session_id) == ["I run shell commands only: send !CMD, for example !uname -a."]
    assert idles(emulator, session_id) == [{"type": "end_turn"}]


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("!ls -l", ["ls -l"]),
        ("!one\n!two\n\n!three", ["one", "two", "three"]),
        ("!cat <<EOF\nline\nEOF", ["cat <<EOF\nline\nEOF"]),
    ],
)
def test_commands_of_a_message(emulator: Emulator, text: str, commands: list[str]) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, text)
    while emulator.pending_calls(session_id):
        emulator.send(session_id, result(emulator.pending_calls(session_id)[0], "out"))
    uses = emulator.events(session_id, "agent.tool_use")
    assert [(use["name"], use["input"]) for use in uses] == [("bash", {"command": command}) for command in commands]
    assert said(emulator, session_id) == ["out"] * len(commands)


def test_an_error_is_marked_when_repeated(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!false")
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0], "exit 1", is_error=True))
    assert said(emulator, session_id) == ["Error: exit 1"]


# Scripts


def test_a_message_consumes_the_script_up_to_its_end(emulator: Emulator) -> None:
    session_id = scripted(emulator, say("one"), end(), say("two"), end())
    emulator.say(session_id, "first")
    assert said(emulator, session_id) == ["one"]
    emulator.say(session_id, "second")
    assert said(emulator, session_id) == ["one", "two"]
    emulator.say(session_id, "third")
    assert said(emulator, session_id)[2].startswith("I run shell commands only")


def test_a_step_may_look_at_the_results(emulator: Emulator) -> None:
    seen: list[ToolResult] = []

    def look(results: Results) -> list[Step]:
        seen.extend(results)
        return [say("first " + results[0].text), say("second " + results[1].text)]

    session_id = scripted(emulator, tools(call("read", file_path="a"), call("read", file_path="b")), look, end())
    emulator.say(session_id, "go")
    first, second = emulator.pending_calls(session_id)
    emulator.send(session_id, result(first, "A"), result(second, "B"))
    assert said(emulator, session_id) == ["first A", "second B"]
    assert [(one.name, one.tool_use_id, one.is_error) for one in seen] == [
        ("read", first, False),
        ("read", second, False),
    ]


def test_every_new_session_gets_the_default_script(emulator: Emulator) -> None:
    emulator.default_script = [say("scripted"), end()]
    sessions = [emulator.create_session(), emulator.create_session()]
    for session_id in sessions:
        emulator.say(session_id, "go")
        assert said(emulator, session_id) == ["scripted"]


def test_a_model_error_ends_the_turn(emulator: Emulator) -> None:
    session_id = scripted(emulator, error("overloaded"), end(), say("recovered"), end())
    emulator.say(session_id, "go")
    (fault,) = emulator.events(session_id, "session.error")
    assert fault["error"]["message"] == "overloaded"
    assert emulator.events(session_id, "span.model_request_end")[0]["is_error"] is True
    assert idles(emulator, session_id) == [{"type": "retries_exhausted"}]
    emulator.say(session_id, "again")
    assert said(emulator, session_id) == ["recovered"]


def test_sleep_keeps_the_session_running_until_the_clock_has_moved(emulator: Emulator) -> None:
    session_id = scripted(emulator, sleep(30), say("first"), sleep(30), say("second"), end())
    emulator.say(session_id, "go")
    assert emulator.session(session_id)["status"] == "running"
    emulator.advance(29)
    assert said(emulator, session_id) == []
    emulator.advance(2)
    assert said(emulator, session_id) == ["first"]
    emulator.advance(3600)
    assert said(emulator, session_id) == ["first", "second"]
    assert 60 <= emulator.session(session_id)["stats"]["active_seconds"] < 61


def test_a_sleeping_script_goes_on_by_itself() -> None:
    with Emulator() as emulator:
        session_id = scripted(emulator, sleep(0.05), say("awake"), end())
        emulator.say(session_id, "go")
        emulator.wait_idle(session_id, timeout=60)
        assert said(emulator, session_id) == ["awake"]


# Messages that wait


def test_a_message_during_a_turn_waits_for_it(emulator: Emulator) -> None:
    session_id = scripted(emulator, tools(call("bash", command="true")), say("one"), end(), say("two"), end())
    emulator.say(session_id, "first")
    waiting = emulator.say(session_id, "second")
    assert waiting["processed_at"] is None
    assert emulator.events(session_id)[-1] == waiting
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0]))

    types = types_of(emulator.events(session_id))
    assert types[-10:] == [
        "session.status_idle",
        "session.status_running",
        "session.thread_status_running",
        "user.message",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    assert emulator.events(session_id)[-7]["id"] == waiting["id"]
    assert emulator.events(session_id)[-7]["processed_at"] is not None
    assert said(emulator, session_id) == ["one", "two"]


# Permissions


def test_an_asked_call_waits_for_the_verdict_and_then_for_its_result(emulator: Emulator) -> None:
    session_id = scripted(emulator, tools(call("bash", permission="ask", command="rm")), repeat_output, end())
    emulator.say(session_id, "go")
    (use,) = emulator.events(session_id, "agent.tool_use")
    assert (use["evaluated_permission"], use["evaluation"]) == ("ask", {"type": "always_ask"})
    with pytest.raises(Invalid, match=r"waits for a user\.tool_confirmation"):
        emulator.send(session_id, result(use["id"]))
    verdict = {"type": "user.tool_confirmation", "tool_use_id": use["id"], "result": "allow"}
    emulator.send(session_id, verdict)
    assert emulator.pending_calls(session_id) == [use["id"]]
    with pytest.raises(Invalid, match="does not wait for a confirmation"):
        emulator.send(session_id, verdict)
    emulator.send(session_id, result(use["id"], "removed"))
    assert said(emulator, session_id) == ["removed"]


def test_a_deny_verdict_resolves_the_call(emulator: Emulator) -> None:
    session_id = scripted(emulator, tools(call("bash", permission="ask", command="rm")), repeat_output, end())
    emulator.say(session_id, "go")
    (call_id,) = emulator.pending_calls(session_id)
    verdict = {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": "deny", "deny_message": "no"}
    emulator.send(session_id, verdict)
    assert said(emulator, session_id) == ["Error: no"]
    with pytest.raises(Invalid, match="not an open call"):
        emulator.send(session_id, result(call_id))


def test_a_call_the_server_denies_waits_for_nobody(emulator: Emulator) -> None:
    session_id = scripted(emulator, tools(call("bash", permission="deny", command="rm")), repeat_output, end())
    emulator.say(session_id, "go")
    (use,) = emulator.events(session_id, "agent.tool_use")
    assert use["evaluated_permission"] == "deny"
    assert "evaluation" not in use
    assert said(emulator, session_id) == ["Error: This call is not permitted."]
    assert idles(emulator, session_id) == [{"type": "end_turn"}]


async def test_the_worker_runs_what_was_allowed_and_nothing_else(tmp_path: Path) -> None:
    with Emulator() as emulator:
        session_id = scripted(
            emulator,
            tools(
                call("bash", permission="ask", command="echo asked"),
                call("bash", permission="deny", command="echo denied"),
                call("bash", command="echo free"),
            ),
            lambda results: say(" ".join(sorted(one.text for one in results))),
            end(),
        )
        emulator.say(session_id, "go")
        async with (
            client_of(emulator, emulator.api_key) as client,
            serving(worker_for(emulator, client, tmp_path, max_idle=0.2)),
        ):
            await asyncio.to_thread(emulator.wait_until, lambda: len(emulator.pending_calls(session_id)) == 1)
            (held,) = emulator.pending_calls(session_id)
            emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": held, "result": "allow"})
            await asyncio.to_thread(emulator.wait_idle, session_id)
        assert said(emulator, session_id) == ["This call is not permitted. asked free"]


# Custom tools


async def test_the_worker_leaves_a_custom_tool_to_its_owner(tmp_path: Path) -> None:
    with Emulator() as emulator:
        session_id = scripted(
            emulator, tools(call("bash", command="echo mine"), custom("weather", city="Berlin")), repeat_output, end()
        )
        emulator.say(session_id, "go")
        async with (
            client_of(emulator, emulator.api_key) as client,
            serving(worker_for(emulator, client, tmp_path, max_idle=60)),
        ):
            await asyncio.to_thread(emulator.wait_until, lambda: len(emulator.pending_calls(session_id)) == 1)
        (use,) = emulator.events(session_id, "agent.custom_tool_use")
        assert emulator.pending_calls(session_id) == [use["id"]]
        with pytest.raises(Invalid, match="is a custom tool call"):
            emulator.send(session_id, result(use["id"]))
        emulator.send(session_id, custom_result(use["id"], "sunny"))
        assert said(emulator, session_id) == ["mine\nsunny"]


def test_a_custom_result_does_not_answer_a_sandbox_call(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    with pytest.raises(Invalid, match="is not a custom tool call"):
        emulator.send(session_id, custom_result(emulator.pending_calls(session_id)[0]))


# Results


def test_a_result_counts_once(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!true")
    (call_id,) = emulator.pending_calls(session_id)
    before = emulator.events(session_id)
    with pytest.raises(Invalid, match="not an open call"):
        emulator.send(session_id, result(call_id), result(call_id))
    assert emulator.events(session_id) == before  # all events of a request, or none
    (sent,) = emulator.send(session_id, result(call_id))
    assert sent["processed_at"] is not None
    assert sent["session_thread_id"] is None
    with pytest.raises(Invalid, match="not an open call"):
        emulator.send(session_id, result(call_id))


# Interrupts


def test_an_interrupt_ends_the_turn_and_leaves_its_call_open(emulator: Emulator) -> None:
    session_id = scripted(emulator, tools(call("bash", command="x")), say("never"), end(), say("next"), end())
    emulator.say(session_id, "go")
    (call_id,) = emulator.pending_calls(session_id)
    emulator.send(session_id, {"type": "user.interrupt"})
    assert types_of(emulator.events(session_id))[-4:] == [
        "user.interrupt",
        "session.thread_status_idle",
        "session.usage",
        "session.status_idle",
    ]
    assert idles(emulator, session_id)[-1] == {"type": "end_turn"}
    assert emulator.pending_calls(session_id) == []

    emulator.send(session_id, result(call_id, "late"))
    assert types_of(emulator.events(session_id))[-4] == "user.tool_result"
    assert idles(emulator, session_id)[-1] == {"type": "end_turn"}
    with pytest.raises(Invalid, match="not an open call"):
        emulator.send(session_id, result(call_id, "later"))

    emulator.say(session_id, "again")
    assert said(emulator, session_id) == ["next"]


def test_an_interrupt_lets_the_waiting_message_follow(emulator: Emulator) -> None:
    session_id = scripted(emulator, sleep(100), end(), say("next"), end())
    emulator.say(session_id, "go")
    emulator.send(session_id, {"type": "user.interrupt"}, message("instead"))
    assert said(emulator, session_id) == ["next"]
    assert types_of(emulator.events(session_id)).index("user.interrupt") > 0
    emulator.advance(200)
    assert said(emulator, session_id) == ["next"]


def test_an_interrupt_queues_a_dormant_session(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    emulator.stop_work(session_id)
    emulator.send(session_id, {"type": "user.interrupt", "session_thread_id": None})
    assert emulator.work(session_id)["state"] == "queued"
    with pytest.raises(Invalid, match="sthr_other"):
        emulator.send(session_id, {"type": "user.interrupt", "session_thread_id": "sthr_other"})


def test_a_terminated_session_takes_nothing(emulator: Emulator) -> None:
    session_id = emulator.create_session()
    emulator.archive_session(session_id)
    with pytest.raises(Invalid, match="is terminated"):
        emulator.say(session_id, "hello")
    assert emulator.session(session_id)["status"] == "terminated"


def test_steps_are_plain_values() -> None:
    assert say("a") == Say("a")
    with pytest.raises(ValueError, match="at least one call"):
        tools()
