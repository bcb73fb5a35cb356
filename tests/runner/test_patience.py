"""SANDBOX_MAX_WAIT_SECONDS: a runner that only waits for others leaves, and what it waited for finds another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from shared.runner_job import EXIT_HANDED_OVER, EXIT_OK
from tests.runner.proxy import Proxy
from tests.runner.support import eventually, in_process, operations, results, texts, until, wait_file
from tools.emulator import Emulator, Switches, call, custom, end, repeat_output, say, sleep, tools

NOBODY = (EXIT_OK, "nobody else went on")
ASKED = call("bash", command="echo yes", permission="ask")


@pytest.fixture
def session_id(emulator: Emulator) -> str:
    return emulator.create_session()


async def waiting(emulator: Emulator, url: str, tmp_path: Path, seconds: str = "0.3", **options: Any) -> Any:
    return await in_process(emulator, url, tmp_path, SANDBOX_MAX_WAIT_SECONDS=seconds, **options)


@pytest.mark.parametrize("seconds", ["0", "0.3"])
async def test_a_person_who_does_not_decide_is_not_waited_for_and_the_verdict_queues_the_session(
    emulator: Emulator, session_id: str, tmp_path: Path, seconds: str
) -> None:
    emulator.set_script(session_id, [tools(call("bash", command="echo one"), ASKED), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await waiting(emulator, emulator.url, tmp_path, seconds)
    assert await runner.run() == NOBODY
    assert results(emulator, session_id) == ["one"]
    assert operations(emulator, "work.heartbeat", "work.stop")[-2:] == ["work.heartbeat", "work.stop"]  # fenced
    (asked,) = emulator.pending_calls(session_id)
    emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": asked, "result": "allow"})
    successor = await in_process(emulator, emulator.url, tmp_path)
    await successor.run()
    assert results(emulator, session_id) == ["one", "yes"]


async def test_another_clients_tool_is_not_waited_for(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    emulator.set_script(session_id, [custom("someone_elses"), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await waiting(emulator, emulator.url, tmp_path)
    assert await runner.run() == NOBODY
    (theirs,) = emulator.pending_calls(session_id)
    emulator.send(session_id, {"type": "user.custom_tool_result", "custom_tool_use_id": theirs, "content": []})
    assert emulator.work(session_id)["state"] == "queued"


async def test_a_session_without_a_message_is_not_waited_for(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    runner = await waiting(emulator, emulator.url, tmp_path)
    assert await runner.run() == NOBODY
    emulator.say(session_id, "!echo hello")
    successor = await in_process(emulator, emulator.url, tmp_path)
    await successor.run()
    assert texts(emulator, session_id) == ["hello"]


async def test_a_first_message_is_waited_for_no_longer_than_the_next_one(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    runner = await waiting(emulator, emulator.url, tmp_path, "3600", SANDBOX_MAX_IDLE_SECONDS="0.3")
    assert await runner.run() == NOBODY


async def test_a_first_message_in_the_last_instant_is_a_reason_to_stay(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """It leads to another client's call, for which a runner is more patient than for a first message."""
    emulator.set_script(session_id, [custom("someone_elses"), repeat_output, end()])
    runner = await in_process(emulator, proxy.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="0.3")
    start = proxy.hold("session")  # the SDK's own
    running = runner.start()
    await start.reached.wait()
    look = proxy.hold("session")  # the guard's before the stop
    start.released.set()
    await look.reached.wait()
    emulator.say(session_id, "go")
    look.released.set()
    (theirs,) = await until(emulator, lambda: emulator.pending_calls(session_id))
    await proxy.wait_count("session", 3)  # the SDK's again: it serves on
    assert operations(emulator, "work.stop") == []
    emulator.send(session_id, {"type": "user.custom_tool_result", "custom_tool_use_id": theirs, "content": []})
    assert await running == (EXIT_OK, "the session is idle")


async def test_neither_a_call_nor_a_thought_counts_as_waiting(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    slow = call("bash", command="sleep 0.7; echo slow")
    emulator.set_script(session_id, [sleep(0.7), tools(slow, custom("someone_elses")), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await waiting(emulator, emulator.url, tmp_path)
    assert await runner.run() == NOBODY
    assert results(emulator, session_id) == ["slow"]
    assert [line["is_error"] for line in runner.events("tool")] == [False]


async def test_a_call_that_outlives_its_turn_is_not_cut_off(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    slow = call("bash", command="echo 1 > begun; sleep 2.5; echo slow")
    emulator.set_script(session_id, [slow, say("never"), end()])
    emulator.say(session_id, "go")
    patient = {"SANDBOX_MAX_IDLE_SECONDS": "60"}
    runner = await waiting(emulator, proxy.url, tmp_path, teardown_seconds=1.0, flush_seconds=0, **patient)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    emulator.send(session_id, {"type": "user.interrupt"})
    assert await running == NOBODY
    assert results(emulator, session_id) == ["slow"]
    assert proxy.count("stream") == 1  # nobody tried to leave before


async def test_a_verdict_before_the_stop_is_served_under_the_same_lease(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [ASKED, repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await waiting(emulator, proxy.url, tmp_path)
    start = proxy.hold("session")  # the SDK's own
    running = runner.start()
    await start.reached.wait()
    look = proxy.hold("session")  # the guard's before the stop
    start.released.set()
    await look.reached.wait()
    (asked,) = emulator.pending_calls(session_id)
    emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": asked, "result": "allow"})
    look.released.set()
    assert await running == (EXIT_OK, "the session is idle")
    assert texts(emulator, session_id) == ["yes"]
    assert operations(emulator, "work.ack", "work.stop") == ["work.ack", "work.stop"]
    assert not runner.events("retry")


@pytest.mark.parametrize("switches", [Switches(), Switches(result_on_stopped_item="ignored")])
async def test_a_verdict_on_its_way_with_the_stop_gets_another_sandbox(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [ASKED, repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await waiting(emulator, proxy.url, tmp_path)
    held = proxy.hold("stop")
    running = runner.start()
    await held.reached.wait()
    (asked,) = emulator.pending_calls(session_id)
    emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": asked, "result": "allow"})
    held.released.set()
    assert await running == NOBODY
    assert "nothing of it was run" in results(emulator, session_id)[0]


async def test_a_stop_that_fails_is_tried_again_after_another_wait(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    runner = await waiting(emulator, proxy.url, tmp_path, max_retries=0)
    broken = proxy.answer("stop", 500, times=1)
    assert await runner.run() == NOBODY
    assert broken.times == 0
    assert proxy.count("stop") == 2
    assert not runner.events("retry")


@pytest.mark.parametrize(("told", "saved"), [(False, "second\n"), (True, "first")])
async def test_memory_that_is_slow_to_save_is_waited_for_unless_the_sandbox_goes(
    emulator: Emulator, proxy: Proxy, tmp_path: Path, told: bool, saved: str
) -> None:
    emulator.memory_root = str(tmp_path / "memory")
    store_id = emulator.add_memory_store("notes", {"/a.md": "first"})
    session_id = emulator.create_session(resources=[store_id])
    write = call("bash", command=f"echo second > {tmp_path}/memory/notes/a.md")
    emulator.set_script(session_id, [tools(write, ASKED), end()])
    emulator.say(session_id, "go")
    runner = await waiting(emulator, proxy.url, tmp_path, teardown_seconds=0.1)
    slow = proxy.hold("memory")
    running = runner.start()
    await slow.reached.wait()
    if told:
        runner.session.leave()
    else:
        await asyncio.sleep(1.0)  # longer than it would have if told to leave
        slow.released.set()
    assert await running == ((EXIT_HANDED_OVER, "told to leave") if told else NOBODY)
    assert emulator.memories(store_id) == {"/a.md": saved}


async def test_somebody_who_comes_in_time_is_served(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    runner = await waiting(emulator, emulator.url, tmp_path, "60", SANDBOX_MAX_IDLE_SECONDS="4")
    running = runner.start()
    await until(emulator, lambda: "events.stream" in operations(emulator))
    await eventually(lambda: "events.list" in operations(emulator))
    emulator.say(session_id, "!echo hello")
    assert await asyncio.wait_for(running, 60) == (EXIT_OK, "the session is idle")
    assert texts(emulator, session_id) == ["hello"]
