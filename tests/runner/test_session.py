"""R4: which stops go through. And the whole path of ordinary calls, through the guard and the middleware."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from anthropic.lib.tools.agent_toolset import AgentToolContext

from shared import runner_clock
from shared.runner_job import EXIT_LEASE_LOST, EXIT_OK
from shared.runner_lease import Lease
from shared.runner_tools import load_custom_tools
from tests.runner.proxy import Proxy
from tests.runner.support import in_process, operations, results, texts, until, wait_file, wait_idle
from tools.emulator import Emulator, Switches, call, custom, end, repeat_output, say, sleep, tools

IDLE = (EXIT_OK, "the session is idle")
TOOLS = '''
from anthropic.lib.tools import BetaAsyncBuiltinFunctionTool, beta_async_tool, beta_tool

class Awaitable(BetaAsyncBuiltinFunctionTool):
    name = "later"
    def to_dict(self): ...
    def call(self, input):  # not a coroutine function, but it returns an awaitable
        async def answer():
            return "later " + input["word"]
        return answer()

def tools(context):
    @beta_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        import threading
        assert threading.current_thread() is not threading.main_thread()
        return f"sunny in {city}"

    @beta_async_tool
    async def where() -> str:
        """Where the tools run."""
        return str(context.workdir)

    return [weather, where, Awaitable()]
'''


@pytest.fixture
def session_id(emulator: Emulator) -> str:
    return emulator.create_session()


async def test_the_stop_goes_through_at_the_end_of_a_turn(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    emulator.say(session_id, "!echo hello")
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert operations(emulator)[-5:] == ["sessions.get", "events.list", "work.heartbeat", "work.stop", "events.list"]
    assert operations(emulator, "work.stop") == ["work.stop"]


@pytest.mark.parametrize(("look", "earlier"), [("session", 1), ("list", 2)])
async def test_a_message_between_the_idle_decision_and_the_stop_is_served_under_the_same_lease(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, look: str, earlier: int
) -> None:
    emulator.say(session_id, "!echo one")
    runner = await in_process(emulator, proxy.url, tmp_path)
    held = proxy.hold(look, times=earlier + 1)  # those at the start, and the guard's before the stop
    held.released.set()
    running = runner.start()
    await proxy.wait_count(look, earlier)
    held.released.clear()
    await wait_idle(emulator, session_id)
    await proxy.wait_count(look, earlier + 1)  # the idle decision has been taken
    emulator.set_script(session_id, [sleep(0.5), call("bash", command="echo two"), repeat_output, end()])
    emulator.say(session_id, "go on")
    held.released.set()
    assert await running == IDLE
    assert texts(emulator, session_id) == ["one", "two"]
    assert operations(emulator, "work.ack", "work.stop") == ["work.ack", "work.stop"]
    assert [record.status for record in emulator.requests if record.operation == "work.heartbeat"].count(412) == 0
    assert not runner.events("retry")


async def test_a_turn_that_already_ran_and_ended_meanwhile_does_not_hold_the_stop_up(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "just talk")
    runner = await in_process(emulator, proxy.url, tmp_path)
    assert await runner.run() == IDLE
    assert proxy.count("stop") == 1


@pytest.mark.parametrize("fault", ["session", "list"])
async def test_a_look_that_fails_lets_no_stop_through(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path, fault: str
) -> None:
    emulator.say(session_id, "!echo one")
    runner = await in_process(emulator, proxy.url, tmp_path)
    answered = proxy.hold("send")
    running = runner.start()
    await answered.reached.wait()
    broken = proxy.answer(fault, 500, times=1)
    answered.released.set()
    assert await running == IDLE
    assert broken.times == 0
    assert operations(emulator, "work.stop") == ["work.stop"]
    assert proxy.count("stream") == 2  # one more pass under the same lease


async def test_no_stop_without_the_conditional_beat(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo one")
    runner = await in_process(emulator, proxy.url, tmp_path)
    answered = proxy.hold("send")
    running = runner.start()
    await answered.reached.wait()
    proxy.answer("beat", 500, times=2)  # the fence and its retry
    answered.released.set()
    await proxy.wait_count("stream", 2)  # so it goes on serving
    assert proxy.count("stop") == 0
    assert await running == IDLE


async def test_a_beat_that_the_fence_could_not_see_answered_is_adopted_by_its_retry(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo one")
    runner = await in_process(emulator, proxy.url, tmp_path)
    answered = proxy.hold("send")
    running = runner.start()
    await answered.reached.wait()
    proxy.lose("beat")
    answered.released.set()
    assert await running == IDLE
    assert proxy.count("stream") == 1


async def test_a_stop_whose_answer_was_lost_counts(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo one")
    runner = await in_process(emulator, proxy.url, tmp_path)
    proxy.lose("stop")
    assert (await runner.run())[0] == EXIT_OK
    assert emulator.work(session_id)["state"] == "stopped"
    assert proxy.count("stream") == 1


async def test_an_interrupt_ends_the_turn_and_the_stop_goes_through(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [call("bash", command="echo seen"), custom("someone_elses"), say("never"), end()])
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start()
    await until(emulator, lambda: len(emulator.events(session_id, "agent.custom_tool_use")) == 1)
    emulator.send(session_id, {"type": "user.interrupt"})
    assert await running == IDLE


async def test_a_terminated_session_is_stopped_without_running_anything(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo no")
    emulator.archive_session(session_id)
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert emulator.work(session_id)["state"] == "stopped"
    assert not runner.events("tool")
    assert not runner.events("retry")  # at once, and not because nothing else helped


async def test_a_deleted_session_ends_the_runner(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    runner = await in_process(emulator, emulator.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="60")
    running = runner.start()
    await until(emulator, lambda: emulator.work(session_id)["state"] == "active")
    emulator.delete_session(session_id)
    assert (await running)[0] == EXIT_LEASE_LOST


async def test_a_set_up_that_fails_for_a_while_stops_nothing(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """GET session failing three times makes the SDK stop a healthy item; here it is tried again."""
    emulator.say(session_id, "!echo late")
    runner = await in_process(emulator, proxy.url, tmp_path)
    broken = proxy.answer("session", 500, times=4)  # the SDK's three attempts, and our look before its stop
    assert await runner.run() == IDLE
    assert broken.times == 0
    assert [line["error"] for line in runner.events("retry")] == ["InternalServerError"]
    assert texts(emulator, session_id) == ["late"]
    assert proxy.count("stop") == 1


async def test_a_set_up_that_keeps_failing_is_told_to_the_agent(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    calls = tools(
        call("bash", command="echo a"),
        call("bash", command="echo b", permission="ask"),
        custom("mine"),
        custom("someone_elses"),
    )
    emulator.set_script(session_id, [calls])
    emulator.say(session_id, "go")
    uses = [event["id"] for event in emulator.events(session_id, "agent.tool_use")]
    emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": uses[1], "result": "allow"})
    runner = await in_process(emulator, proxy.url, tmp_path, max_retries=0, SANDBOX_TOOL_NAMES="mine")
    proxy.answer("session", 500, times=1000)
    code, reason = await runner.run()
    assert (code, reason) == (EXIT_OK, "set-up failed 3 times (InternalServerError); the agent was told")
    answers = emulator.events(session_id, "user.tool_result")
    assert [answer["tool_use_id"] for answer in answers] == uses
    assert all(answer["is_error"] for answer in answers)
    assert "InternalServerError" in results(emulator, session_id)[0]
    assert len(emulator.pending_calls(session_id)) == 1  # the other client's call is not ours to answer
    assert len(emulator.events(session_id, "user.custom_tool_result")) == 1
    assert operations(emulator)[-4:] == ["work.stop", *["events.send"] * 3]
    assert emulator.work(session_id)["state"] == "queued"  # by the answers: what comes next gets another sandbox
    assert len(runner.events("retry")) == 3


async def test_who_cannot_give_up_goes_on_trying_and_no_other_stop_slips_through(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    emulator.say(session_id, "!echo late")
    runner = await in_process(emulator, proxy.url, tmp_path, max_retries=0, pause_seconds=0.02)
    proxy.answer("session", 500, times=1000)
    proxy.answer("list", 500, times=2)  # at the start; and after the third pass we cannot see whom to tell
    proxy.answer("stop", 500, times=2)  # after the fourth, not stop; and the SDK's stop of the fifth is still refused
    assert (await runner.run())[1] == "set-up failed 5 times (InternalServerError); the agent was told"
    assert proxy.count("stop") == 3
    assert len(results(emulator, session_id)) == 1


async def test_a_stream_that_is_refused_at_once_is_a_failure_and_no_endless_loop(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    """The SDK returns as if all were well when its stream meets a 403."""
    emulator.say(session_id, "!echo never")
    runner = await in_process(emulator, proxy.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="10")
    proxy.answer("stream", 403, times=1000)
    assert (await runner.run())[1] == "set-up failed 3 times (EndedEarly); the agent was told"
    assert proxy.count("stream") == 3
    assert "could not be set up" in results(emulator, session_id)[0]


@pytest.mark.usefixtures("quick_beats")
async def test_a_graceful_stop_by_an_operator(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    emulator.say(session_id, "![ -e begun ] || { echo 1 > begun; sleep 300; }")
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start()
    await wait_file(tmp_path / "workspace" / "begun")
    emulator.stop_work(session_id)
    assert await running == (EXIT_OK, "stopped by the operator")
    assert operations(emulator)[-2:] == ["work.stop", "events.send"]
    assert "may have taken effect" in results(emulator, session_id)[0]


async def test_outputs_of_every_size_arrive(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    emulator.set_script(
        session_id,
        [
            call("bash", command="true"),
            repeat_output,
            call("bash", command="head -c 1000000 /dev/zero | tr '\\0' x"),
            repeat_output,
            call("bash", command="exit 3"),
            repeat_output,
            end(),
        ],
    )
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    empty, large, failed = texts(emulator, session_id)
    assert empty == "(no output)"
    assert large.startswith("[output truncated]")
    assert len(large) > 100_000
    assert failed.startswith("Error:")


async def test_every_tool_of_the_toolset_works_through_the_guard(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(
        session_id,
        [
            tools(call("write", file_path="a.txt", content="one\n")),
            tools(call("edit", file_path="a.txt", old_string="one", new_string="two")),
            tools(call("read", file_path="a.txt"), call("glob", pattern="*.txt"), call("grep", pattern="tw.")),
            tools(call("bash", command="cd / && export X=1"), call("bash", command="pwd; echo $X")),
            repeat_output,
            end(),
        ],
    )
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    answers = results(emulator, session_id)
    assert "two" in answers[2]
    assert "a.txt" in answers[3]
    assert "two" in answers[4]
    assert answers[6] == "/\n1"  # one shell for the whole session
    assert [line["name"] for line in runner.events("tool")][:2] == ["write", "edit"]
    assert not any(line["is_error"] for line in runner.events("tool"))


async def test_custom_tools_sync_and_async_run_and_those_of_others_are_left_alone(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TOOLS)
    calls = [custom("weather", city="Ghent"), custom("where"), custom("later", word="on"), custom("someone_elses")]
    emulator.set_script(session_id, [tools(*calls), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path, SANDBOX_TOOL_NAMES="weather")
    running = runner.start(load_custom_tools(f"{tmp_path}/mine.py:tools"))
    await until(emulator, lambda: len(results(emulator, session_id)) == 3)
    assert results(emulator, session_id) == ["sunny in Ghent", str(tmp_path / "workspace"), "later on"]
    (theirs,) = emulator.pending_calls(session_id)
    emulator.send(session_id, {"type": "user.custom_tool_result", "custom_tool_use_id": theirs, "content": []})
    assert await running == IDLE
    (unnamed,) = runner.events("unnamed")
    assert unnamed["tools"] == ["later", "where"]
    assert "SANDBOX_TOOL_NAMES" in unnamed["reason"]


def test_custom_tools_are_found_by_module_or_by_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def tools(context): return [context]\nnumber = 1\n")
    context = AgentToolContext(workdir=tmp_path)
    assert load_custom_tools(None)(context) == ()
    assert load_custom_tools(f"{tmp_path}/mine.py:tools")(context) == [context]
    assert load_custom_tools("os:listdir").__name__ == "listdir"
    for reference in ("mine", ":tools", "mine:", "no_such_module:tools", f"{tmp_path}/mine.py:number"):
        with pytest.raises(ImportError):
            load_custom_tools(reference)
    with pytest.raises(AttributeError):
        load_custom_tools(f"{tmp_path}/mine.py:missing")
    with pytest.raises(FileNotFoundError):
        load_custom_tools(f"{tmp_path}/missing.py:tools")


async def test_a_call_held_for_a_person_runs_after_the_yes_and_not_before(
    emulator: Emulator, session_id: str, tmp_path: Path
) -> None:
    emulator.set_script(session_id, [tools(call("bash", permission="ask", command="echo yes")), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path)
    running = runner.start()
    await until(emulator, lambda: "events.list" in operations(emulator))
    (pending,) = emulator.pending_calls(session_id)
    assert not runner.events("tool")
    emulator.send(session_id, {"type": "user.tool_confirmation", "tool_use_id": pending, "result": "allow"})
    assert await running == IDLE
    assert texts(emulator, session_id) == ["yes"]


@pytest.mark.parametrize("switches", [Switches(work_id="work_", secret="extra_keys")])
async def test_ids_and_secrets_are_opaque(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    emulator.say(session_id, "!echo opaque")
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert texts(emulator, session_id) == ["opaque"]
    assert {record.credential for record in emulator.requests if record.operation != "work.poll"} == {"sessions_token"}


async def test_a_long_thought_is_waited_for(emulator: Emulator, session_id: str, tmp_path: Path) -> None:
    """A running session is not idle, however long nothing happens."""
    emulator.set_script(session_id, [say("hm"), sleep(1.0), call("bash", command="echo thought"), repeat_output, end()])
    emulator.say(session_id, "go")
    runner = await in_process(emulator, emulator.url, tmp_path)
    assert await runner.run() == IDLE
    assert texts(emulator, session_id) == ["hm", "thought"]


async def test_the_lock_record_follows_the_session(
    emulator: Emulator, proxy: Proxy, session_id: str, tmp_path: Path
) -> None:
    record = tmp_path / "state" / "runner.lock"
    held = proxy.hold("stop")
    runner = await in_process(emulator, proxy.url, tmp_path, SANDBOX_MAX_IDLE_SECONDS="5")
    assert '"loading"' in record.read_text()
    running = runner.start()
    await proxy.wait_count("stream", 1)
    heartbeat = emulator.work(session_id)["latest_heartbeat_at"]
    assert '"claimed"' in record.read_text()
    assert heartbeat in record.read_text()
    emulator.say(session_id, "talk")
    await held.reached.wait()
    assert '"leaving"' in record.read_text()  # also after the beat of the fence
    held.released.set()
    await running


def test_the_leases_clock_counts_suspended_time_where_the_system_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 7, raising=False)
    monkeypatch.setattr(time, "clock_gettime", {7: 70.0}.__getitem__)
    assert runner_clock.now() == 70.0
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    monkeypatch.setattr(time, "monotonic", lambda: 30.0)
    assert runner_clock.now() == 30.0


async def test_a_lease_is_as_fresh_as_its_last_beat_was_when_sent() -> None:
    """R5: TTL - 60 s, by a clock that can jump."""
    at = 1000.0
    beats: list[str] = []
    lease = Lease(beats.append, now=lambda: at)
    lease.beaten("a", 300, sent_at=990.0)
    assert beats == ["a"]
    assert lease.age_seconds == 10
    at = 990 + 239.9
    assert lease.fresh
    at = 990 + 240.0
    assert not lease.fresh
    waiting = asyncio.create_task(lease.wait_fresh(lease.lost))
    await asyncio.sleep(0)
    assert not waiting.done()
    lease.beaten("b", 300, sent_at=at)
    await waiting
    at += 240
    waiting = asyncio.create_task(lease.wait_fresh(lease.lost, lease.stopping))
    await asyncio.sleep(0)
    lease.stopping.set()
    await waiting
    at += 60
    await asyncio.wait_for(lease.watch(), 60)
    assert lease.lost.is_set()
    lease.beaten("c", 300, sent_at=at)
    assert not lease.fresh  # lost is lost
