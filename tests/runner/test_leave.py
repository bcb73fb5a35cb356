"""R5 and R6 in this process: what SIGTERM and a lost lease do to a call, its answer and the item."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.lib.tools import ToolError, beta_async_tool, beta_tool
from anthropic.types.beta.environments import BetaSelfHostedWorkHeartbeatResponse

from shared.runner_job import EXIT_HANDED_OVER, EXIT_LEASE_LOST, EXIT_OK
from shared.runner_lease import NO_HEARTBEAT, note_beat
from shared.runner_tools import INTERRUPTED, NOT_STARTED, ToolFactory
from tests.runner.proxy import Proxy
from tests.runner.support import (
    PATIENCE_SECONDS,
    Bench,
    eventually,
    in_process,
    operations,
    results,
    texts,
    until,
    wait_file,
    wait_idle,
)
from tools.emulator import Emulator, Switches, call, custom, end, repeat_output, tools

HANDED_OVER = (EXIT_HANDED_OVER, "told to leave")
SLOW = "![ -e begun ] || { echo 1 > begun; sleep 300; }; echo went on"


@pytest.fixture
def session_id(emulator: Emulator) -> str:
    return emulator.create_session()


async def test_sigterm_in_a_call_stops_first_and_answers_then_so_that_the_next_runner_goes_on(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, SLOW)
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    runner.session.leave()
    runner.session.leave()  # twice is once
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == HANDED_OVER
    assert operations(emulator)[-3:] == ["work.heartbeat", "work.stop", "events.send"]
    assert results(emulator, session_id) == [INTERRUPTED]
    assert runner.events("handover") == [{"event": "handover", "answers": 1, "stopped": True}]
    assert runner.kills > 0
    assert emulator.work(session_id)["state"] == "queued"

    emulator.say(session_id, "!echo and on")
    successor = await in_process(emulator, emulator.url, tmp_path)
    await successor.run()
    assert texts(emulator, session_id) == [f"Error: {INTERRUPTED}", "and on"]


async def test_sigterm_starts_no_further_call(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    slow = call("bash", command="echo 1 > begun; sleep 300")
    emulator.set_script(session_id, [tools(slow, call("bash", command="echo 2 > second")), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    runner.session.leave()
    assert await running == HANDED_OVER
    assert not (tmp_path / "workspace" / "second").exists()
    assert results(emulator, session_id) == [INTERRUPTED]
    successor = await in_process(emulator, emulator.url, tmp_path)
    await successor.run()
    assert (tmp_path / "workspace" / "second").exists()  # the next runner's to run


async def test_sigterm_while_idle_stops_and_has_nothing_to_answer(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo hello")
    runner = await in_process(emulator, emulator.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="60")
    running = runner.start()
    await wait_idle(emulator, session_id)
    runner.session.leave()
    assert await running == HANDED_OVER
    assert emulator.work(session_id)["state"] == "stopped"
    assert runner.events("handover") == [{"event": "handover", "answers": 0, "stopped": True}]


@pytest.fixture
def laden(emulator: Emulator, tmp_path: Path) -> tuple[str, str]:
    """A session with a skill and a memory store, and the store's id."""
    emulator.memory_root = str(tmp_path / "memory")
    store_id = emulator.add_memory_store("notes", {"/a.md": "first"})
    skill_id = emulator.add_skill("pdf", {"SKILL.md": "how to"})
    return emulator.create_session(skills=[skill_id], resources=[store_id]), store_id


@pytest.mark.parametrize("operation", ["session", "skill", "memories", "list", "stream"])
async def test_sigterm_during_set_up_ends_it(
    emulator: Emulator, proxy: Proxy, laden: tuple[str, str], tmp_path: Path, operation: str
) -> None:
    session_id, store_id = laden
    emulator.say(session_id, "!echo hello")
    runner = await in_process(emulator, proxy.url, tmp_path)
    held = proxy.hold(operation)
    running = runner.start()
    await held.reached.wait()
    runner.session.leave()
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == HANDED_OVER
    assert emulator.work(session_id)["state"] == "stopped"
    assert proxy.count("stop") == 1
    assert not runner.events("tool")
    assert emulator.memories(store_id) == {"/a.md": "first"}


async def test_sigterm_saves_the_memory_before_the_stop(
    emulator: Emulator, laden: tuple[str, str], tmp_path: Path
) -> None:
    session_id, store_id = laden
    command = f"cat skills/*/SKILL.md; echo second > {tmp_path}/memory/notes/a.md; echo 1 > begun; sleep 300"
    emulator.say(session_id, f"!{command}")
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    runner.session.leave()
    assert await running == HANDED_OVER
    assert emulator.memories(store_id) == {"/a.md": "second\n"}
    done = operations(emulator)
    assert done.index("memories.update") < done.index("work.stop") < done.index("events.send")


async def test_sigterm_between_two_attempts_to_set_up(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    patient = {"SANDBOX_MAX_IDLE_SECONDS": "30"}  # there is no message: it would leave for want of one
    runner = await in_process(emulator, proxy.url, tmp_path, pause_seconds=60, **patient)
    proxy.answer("session", 500, times=4)
    running = runner.start()
    await eventually(lambda: runner.events("retry"))
    runner.session.leave()
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == HANDED_OVER
    assert proxy.count("stop") == 1


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
async def test_sigterm_when_the_lease_is_another_runners_stops_and_answers_nothing(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, SLOW)
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    emulator.advance(400)
    runner.session.leave()
    assert await running == (EXIT_LEASE_LOST, "the lease was lost")
    assert operations(emulator, "work.stop", "events.send") == []
    assert emulator.work(session_id)["state"] == "queued"


async def test_the_held_answer_goes_out_even_when_the_stop_could_not(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, SLOW)
    runner = await in_process(emulator, proxy.url, tmp_path)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    proxy.answer("stop", 500, times=1000)
    runner.session.leave()
    assert await running == HANDED_OVER
    assert runner.events("handover") == [{"event": "handover", "answers": 1, "stopped": False}]
    assert results(emulator, session_id) == [INTERRUPTED]


async def test_a_control_plane_that_hangs_does_not_keep_the_runner(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, SLOW)
    runner = await in_process(emulator, proxy.url, tmp_path, teardown_seconds=0.5, leave_seconds=0.5)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    for operation in ("beat", "stop", "send", "session"):
        proxy.hold(operation, times=1000)
    runner.session.leave()
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == HANDED_OVER
    assert proxy.count("stop") == 0


@pytest.mark.parametrize("switches", [Switches(lease_lapse="requeue")])
@pytest.mark.usefixtures("quick_beats")
async def test_a_lost_lease_ends_the_call_and_drops_its_answer(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, SLOW)
    runner = await in_process(emulator, proxy.url, tmp_path)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    emulator.advance(400)
    assert await running == (EXIT_LEASE_LOST, "the lease was lost")
    assert runner.kills > 0
    assert proxy.count("send") == 0
    assert proxy.count("stop") == 0


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends the threads that were left behind, with the test."""
    release = threading.Event()
    yield release
    release.set()


def blocking(begun: threading.Event, release: threading.Event) -> ToolFactory:
    @beta_tool
    def slow() -> str:
        """Blocks its thread."""
        begun.set()
        release.wait(60)
        return "late"

    return lambda context: [slow]


async def test_a_sync_tool_is_left_behind_on_its_thread(
    emulator: Emulator, session_id: str, tmp_path: Path, release: threading.Event
) -> None:
    begun = threading.Event()
    emulator.set_script(session_id, [custom("slow"), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start(blocking(begun, release))
    assert await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
    runner.session.leave()
    assert await asyncio.wait_for(running, PATIENCE_SECONDS) == HANDED_OVER
    assert results(emulator, session_id) == [INTERRUPTED]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@beta_async_tool
async def quick() -> str:
    """Answers at once."""
    return "done"


@beta_async_tool
async def slow() -> str:
    """Answers never."""
    await asyncio.sleep(300)
    return "never"


@pytest.mark.parametrize(("age", "stop_sent"), [(241, False), (1, True)])
async def test_a_call_waits_for_a_beat_when_the_last_is_too_old_or_came_before_a_stop(
    bench: Bench, age: int, stop_sent: bool
) -> None:
    bench.time, bench.lease.stop_sent = age, stop_sent
    calling = asyncio.create_task(bench.guard.run(quick, {}))
    await asyncio.wait([calling], timeout=0.05)
    assert not calling.done()
    bench.lease.beaten("b", 300, sent_at=age)
    assert await calling == "done"


@pytest.mark.parametrize("state", ["stopping", "stopped"])
def test_a_stop_is_ours_when_we_have_sent_one_and_it_is_done(bench: Bench, state: Any) -> None:
    bench.lease.stop_sent = True
    answer = BetaSelfHostedWorkHeartbeatResponse(
        type="work_heartbeat", last_heartbeat="a", lease_extended=False, state=state, ttl_seconds=300
    )
    note_beat(bench.lease, answer, sent_at=1.0)
    assert bench.lease.stopping.is_set()
    assert bench.lease.stop_sent is (state == "stopped")


@pytest.mark.parametrize("ends", ["leaving", "lost", "stopping"])
async def test_a_call_that_waits_for_a_beat_does_not_outlast_its_runner(bench: Bench, ends: str) -> None:
    bench.time = 241
    calling = asyncio.create_task(bench.guard.run(quick, {}))
    await asyncio.sleep(0)
    (bench.leaving if ends == "leaving" else getattr(bench.lease, ends)).set()
    with pytest.raises(ToolError, match=NOT_STARTED):
        await calling


@pytest.mark.parametrize("ends", ["leaving", "lost", "stopping"])
async def test_a_running_call_is_ended_and_its_processes_killed(bench: Bench, ends: str) -> None:
    calling = asyncio.create_task(bench.guard.run(slow, {}))
    await asyncio.sleep(0)
    (bench.leaving if ends == "leaving" else getattr(bench.lease, ends)).set()
    with pytest.raises(ToolError, match=INTERRUPTED):
        await asyncio.wait_for(calling, PATIENCE_SECONDS)
    assert bench.killed == 1
    assert [(line["name"], line["is_error"]) for line in bench.lines] == [("slow", True)]


async def test_a_call_that_refuses_to_end_is_given_up(bench: Bench) -> None:
    done = asyncio.Event()

    @beta_async_tool
    async def stubborn() -> str:
        """Does not end when told to."""
        while not done.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await done.wait()
        return "late"

    calling = asyncio.create_task(bench.guard.run(stubborn, {}))
    await asyncio.sleep(0)
    bench.leaving.set()
    with pytest.raises(ToolError, match=INTERRUPTED):
        await asyncio.wait_for(calling, PATIENCE_SECONDS)
    assert bench.killed == 1
    done.set()


async def test_the_sdks_time_limit_ends_a_call_and_what_it_started_and_leaves_the_rest_alone(bench: Bench) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bench.guard.run(slow, {}), 0.05)
    assert (bench.killed, bench.leftovers_killed) == (0, 1)
    assert [line["is_error"] for line in bench.lines] == [True]


@pytest.mark.parametrize("in_time", [True, False])
async def test_what_a_command_left_is_killed_when_it_took_too_long_and_not_when_it_failed(
    bench: Bench, in_time: bool
) -> None:
    @beta_async_tool
    async def command() -> str:
        """Fails."""
        raise ToolError("failed") from (None if in_time else TimeoutError())

    with pytest.raises(ToolError):
        await bench.guard.run(command, {})
    await bench.guard.run(quick, {})
    assert bench.leftovers_killed == (0 if in_time else 1)


async def test_what_a_tool_raises_is_what_the_sdk_sees(bench: Bench) -> None:
    @beta_async_tool
    async def broken() -> str:
        """Breaks."""
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await bench.guard.run(broken, {})
    assert [line["is_error"] for line in bench.lines] == [True]


async def test_an_item_that_was_stopped_by_force_needs_no_stop(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    runner = await in_process(emulator, emulator.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="60")
    running = runner.start()
    await until(emulator, lambda: emulator.work(session_id)["state"] == "active")
    emulator.stop_work(session_id, force=True)
    runner.session.leave()
    assert await running == HANDED_OVER
    assert runner.events("handover") == [{"event": "handover", "answers": 0, "stopped": True}]
    assert operations(emulator, "work.stop") == []


@pytest.mark.usefixtures("quick_beats")
@pytest.mark.parametrize(
    ("force", "switches"),
    [(False, Switches()), *((True, Switches(heartbeat_on_queued=status)) for status in (412, 404, 409))],
)
async def test_what_is_queued_while_a_runner_obeys_a_stop_is_not_stopped(
    emulator: Emulator, session_id: str, tmp_path: Path, force: bool
) -> None:
    """The runner knows of the stop and ends its call; meanwhile the item is stopped, and a message queues it again."""
    emulator.say(session_id, SLOW)
    runner = await in_process(emulator, emulator.url, tmp_path)

    def queue_again() -> None:
        if not force:
            emulator.stop_work(session_id, force=True)
        emulator.say(session_id, "!echo and on")

    runner.on_first_kill = queue_again
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    emulator.stop_work(session_id, force=force)
    assert await running == (EXIT_OK, "stopped by the operator")
    assert operations(emulator, "work.stop") == []
    assert results(emulator, session_id) == [INTERRUPTED]
    assert emulator.work(session_id)["state"] == "queued"

    successor = await in_process(emulator, emulator.url, tmp_path)
    await successor.run()
    assert texts(emulator, session_id)[-1] == "and on"


@pytest.mark.usefixtures("quick_beats")
async def test_what_another_runner_has_claimed_meanwhile_is_not_stopped_and_gets_no_answer(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, SLOW)
    runner = await in_process(emulator, emulator.url, tmp_path)

    def claim_again() -> None:
        emulator.say(session_id, "and on")
        environment_id = emulator.environment_id
        with anthropic.Anthropic(auth_token=emulator.environment_key, base_url=emulator.url) as client:
            work = client.beta.environments.work
            item = work.poll(environment_id)
            assert item is not None
            work.ack(item.id, environment_id=environment_id)
            work.heartbeat(item.id, environment_id=environment_id, expected_last_heartbeat=NO_HEARTBEAT)

    runner.on_first_kill = claim_again
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    emulator.stop_work(session_id, force=True)
    assert await running == (EXIT_LEASE_LOST, "the lease was lost")
    assert operations(emulator, "work.stop", "events.send") == []
    assert emulator.work(session_id)["state"] == "active"
