"""P3 and R5 at the start, P1 after the stop: what the runner answers in a tool's place."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from shared import healing
from shared.runner_answers import INTERRUPTED_BEFORE, LOST, NEVER_STARTED
from shared.runner_events import OWNED_TOOLS
from shared.runner_job import EXIT_OK
from shared.runner_journal import Journal
from shared.runner_tools import NOT_STARTED
from tests.runner.proxy import Proxy
from tests.runner.support import (
    Start,
    in_process,
    job_values,
    operations,
    results,
    texts,
    until,
    wait_file,
    wait_idle,
)
from tools.emulator import Emulator, Switches, call, custom, end, repeat_output, say, sleep, tools

IDLE = (EXIT_OK, "the session is idle")
ONCE = "echo run >> runs; echo 1 > begun; sleep 300"


@pytest.fixture
def session_id(emulator: Emulator) -> str:
    return emulator.create_session()


def begun(tmp_path: Path, *call_ids: str) -> None:
    """What a dead predecessor leaves behind."""
    directory = tmp_path / "workspace" / ".sandbox"
    directory.parent.mkdir(exist_ok=True)
    for call_id in call_ids:
        assert Journal(directory).begin(call_id)


def test_the_toolset_is_the_one_that_healing_answers_for() -> None:
    assert OWNED_TOOLS == healing.OWNED_TOOLS


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
async def test_a_call_that_a_killed_runner_had_begun_is_answered_and_not_run_again(
    emulator: Emulator, session_id: str, start: Start, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [call("bash", command=ONCE), repeat_output, end()])
    emulator.say(session_id, "go")
    first = await start(await job_values(emulator, emulator.url))
    await wait_file(tmp_path / "workspace" / "begun")
    os.killpg(first.process.pid, signal.SIGKILL)
    await first.exit()
    emulator.advance(400)
    second = await start(await job_values(emulator, emulator.url))
    assert await second.exit() == IDLE
    assert texts(emulator, session_id) == [f"Error: {LOST}"]
    assert (tmp_path / "workspace" / "runs").read_text() == "run\n"


async def test_only_what_was_begun_is_answered_and_the_rest_runs(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    same = call("bash", command="echo run >> runs; echo same")
    emulator.set_script(session_id, [tools(same, same, call("bash", command="echo other")), end()])
    emulator.say(session_id, "go")
    begun(tmp_path, emulator.pending_calls(session_id)[0], "sevt_of_an_old_copy")
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert results(emulator, session_id) == [LOST, "same", "other"]
    assert (tmp_path / "workspace" / "runs").read_text() == "run\n"


async def test_a_custom_tool_that_was_begun_is_answered_as_one(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [custom("mine"), repeat_output, end()])
    emulator.say(session_id, "go")
    begun(tmp_path, *emulator.pending_calls(session_id))
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert texts(emulator, session_id) == [f"Error: {LOST}"]


async def test_an_answer_that_comes_too_late_does_not_keep_the_others(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [tools(call("bash", command="one"), call("bash", command="two")), end()])
    emulator.say(session_id, "go")
    first, second = emulator.pending_calls(session_id)
    begun(tmp_path, first, second)
    runner = await in_process(emulator, proxy.url, tmp_path)
    held = proxy.hold("send")
    running = runner.start()
    await held.reached.wait()
    late = [{"type": "text", "text": "late"}]
    emulator.send(session_id, {"type": "user.tool_result", "tool_use_id": first, "content": late})
    held.released.set()
    assert await running == IDLE
    assert results(emulator, session_id) == ["late", LOST]
    assert not runner.events("retry")


async def test_a_lost_call_that_cannot_be_answered_at_the_start_is_not_run_either(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [call("bash", command="echo run > runs"), repeat_output, end()])
    emulator.say(session_id, "go")
    begun(tmp_path, *emulator.pending_calls(session_id))
    runner = await in_process(emulator, proxy.url, tmp_path, max_retries=0)
    proxy.answer("list", 500, times=1)
    assert await runner.run() == IDLE
    assert "was not run again" in texts(emulator, session_id)[0]
    assert not (tmp_path / "workspace" / "runs").exists()


async def test_an_answer_that_the_server_refuses_for_good_does_not_run_its_call_twice(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """The SDK gives such an answer up, and runs the call again at its next look at the history."""
    emulator.set_script(session_id, [call("bash", command="echo run >> runs"), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await in_process(emulator, proxy.url, tmp_path)
    refused = proxy.answer("send", 413, times=1)
    running = runner.start()
    await refused.reached.wait()
    emulator.cut_stream(session_id)
    assert await running == IDLE
    assert "was not run again" in texts(emulator, session_id)[0]
    assert (tmp_path / "workspace" / "runs").read_text() == "run\n"


async def test_what_only_looks_may_run_again(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    emulator.set_script(session_id, [call("glob", pattern="*.txt"), repeat_output, end()])
    emulator.say(session_id, "go")
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "a.txt").touch()
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert "a.txt" in texts(emulator, session_id)[0]
    assert not (tmp_path / "workspace" / ".sandbox").exists()


@pytest.mark.parametrize(
    ("switches", "answers"),
    [
        (Switches(), [INTERRUPTED_BEFORE] * 2),
        (Switches(interrupted_call="closed"), []),
        (Switches(interrupted_call="closed", result_for_closed_call=200), []),
    ],
)
async def test_calls_of_an_interrupted_turn_are_answered_not_run_and_do_not_keep_the_runner(
    emulator: Emulator, session_id: str, tmp_path: Path, answers: list[str]
) -> None:
    calls = tools(call("bash", command="echo run > runs"), custom("mine"), custom("someone_elses"))
    emulator.set_script(session_id, [calls, end()])
    emulator.say(session_id, "go")
    emulator.send(session_id, {"type": "user.interrupt"})
    runner = await in_process(emulator, emulator.url, tmp_path, SANDBOX_TOOL_NAMES="mine")
    assert await asyncio.wait_for(runner.run(), 60) == IDLE
    assert results(emulator, session_id) == answers
    assert not (tmp_path / "workspace" / "runs").exists()
    assert not runner.events("retry")


async def test_a_call_made_after_the_interrupt_runs(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    same = call("bash", command="echo run >> runs; echo ran")
    emulator.set_script(session_id, [same, end(), same, repeat_output, end()])
    emulator.say(session_id, "go")
    emulator.send(session_id, {"type": "user.interrupt"})
    emulator.say(session_id, "again")
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert results(emulator, session_id) == [INTERRUPTED_BEFORE, "ran"]
    assert (tmp_path / "workspace" / "runs").read_text() == "run\n"


async def test_a_start_that_hangs_does_not_keep_the_session(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo hello")
    held = proxy.hold("list", times=1)
    runner = await in_process(emulator, proxy.url, tmp_path, settle_calls_seconds=0.2)
    assert await runner.run() == IDLE
    assert held.times == 0
    assert texts(emulator, session_id) == ["hello"]


# --- After the stop ---------------------------------------------------------------------------------------------------


async def stop_held(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, *, is_answered: bool = True, **options: Any
) -> Any:
    """A runner whose stop, decided upon and fenced, is on its way."""
    emulator.say(session_id, "!echo one")
    runner = await in_process(emulator, proxy.url, tmp_path, **options)
    held = proxy.hold("stop", is_answered=is_answered)
    running = runner.start()
    await held.reached.wait()
    return runner, running, held


@pytest.mark.parametrize("is_answered", [True, False])
@pytest.mark.parametrize("switches", [Switches(), Switches(unprocessed_input_at_stop="strand")])
async def test_a_message_in_the_last_instant_gets_another_sandbox(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, is_answered: bool
) -> None:
    _, running, held = await stop_held(emulator, proxy, session_id, tmp_path, is_answered=is_answered)
    emulator.set_script(session_id, [call("bash", command="echo two > two"), repeat_output, end()])
    emulator.say(session_id, "wait")
    assert emulator.work(session_id)["state"] == "active"
    held.released.set()
    assert await running == IDLE
    assert results(emulator, session_id) == ["one", NEVER_STARTED]
    assert emulator.work(session_id)["state"] == "queued"
    assert not (tmp_path / "workspace" / "two").exists()


@pytest.mark.parametrize(("is_answered", "thinking"), [(True, 0.5), (False, 2.0)])
async def test_a_message_in_the_last_instant_that_is_still_thought_about(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, is_answered: bool, thinking: float
) -> None:
    """Without an answer to its stop the runner goes on, and finds that it was recorded."""
    _, running, held = await stop_held(
        emulator, proxy, session_id, tmp_path, look_back_seconds=60.0, is_answered=is_answered
    )
    emulator.set_script(session_id, [sleep(thinking), call("bash", command="echo two > two"), repeat_output, end()])
    emulator.say(session_id, "wait")
    held.released.set()
    assert await running == IDLE
    one, two = results(emulator, session_id)
    assert (one, two in (NEVER_STARTED, NOT_STARTED)) == ("one", True)
    assert not (tmp_path / "workspace" / "two").exists()


async def test_thinking_is_not_waited_for_for_ever(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    _, running, held = await stop_held(emulator, proxy, session_id, tmp_path, look_back_seconds=0.3)
    emulator.set_script(session_id, [sleep(600), say("late"), end()])
    emulator.say(session_id, "wait")
    held.released.set()
    assert await asyncio.wait_for(running, 60) == IDLE


async def test_what_waits_for_others_after_the_stop_is_left_to_them(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    _, running, held = await stop_held(emulator, proxy, session_id, tmp_path)
    asked = call("bash", command="echo two", permission="ask")
    emulator.set_script(session_id, [tools(asked, custom("someone_elses")), end()])
    emulator.say(session_id, "wait")
    held.released.set()
    assert await asyncio.wait_for(running, 60) == IDLE
    assert results(emulator, session_id) == ["one"]


async def test_what_is_queued_again_is_another_runners(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """The look back sees a call that waits, and leaves it: the item is not stopped any more."""
    _, running, held = await stop_held(emulator, proxy, session_id, tmp_path)
    look = proxy.hold("list")
    held.released.set()
    await look.reached.wait()
    emulator.set_script(session_id, [call("bash", command="echo two"), repeat_output, end()])
    emulator.say(session_id, "wait")
    assert emulator.work(session_id)["state"] == "queued"
    look.released.set()
    assert await running == IDLE
    assert results(emulator, session_id) == ["one"]


@pytest.mark.parametrize("switches", [Switches(token_after_stop="401")])
async def test_a_token_that_ends_with_its_item_ends_the_look_back(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo one")
    runner = await in_process(emulator, proxy.url, tmp_path)
    assert await runner.run() == IDLE
    assert [line["error"] for line in runner.events("retry")] == ["AuthenticationError"]
    assert operations(emulator)[-1] == "events.list"
    await wait_idle(emulator, session_id)


async def test_a_newcomer_does_not_wait_for_the_look_back(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    runner, running, held = await stop_held(emulator, proxy, session_id, tmp_path, look_back_seconds=30)
    emulator.set_script(session_id, [sleep(600), say("late"), end()])
    emulator.say(session_id, "wait")
    held.released.set()
    await until(emulator, lambda: emulator.work(session_id)["state"] == "stopped")
    runner.session.leave()
    await asyncio.wait_for(running, 60)
