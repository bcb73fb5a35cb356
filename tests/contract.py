"""What every provider must do: one suite, one subclass per provider.

A subclass says how its provider is made. Each test then runs the whole path: emulator, dispatcher, that provider's
sandboxes, the real runner with the real SDK. Commands that act on the runner use `$PPID`: the agent's shell is its
child.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, PATIENCE_SECONDS, RECLAIM_SECONDS, Core, World
from tools.emulator import Emulator, Switches, call, custom, end, repeat_output, say, tools

CUSTOM_TOOLS = '''
from anthropic.lib.tools import beta_async_tool, beta_tool

def tools(context):
    @beta_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    @beta_async_tool
    async def where() -> str:
        """Where the tools run."""
        return str(context.workdir)

    return [weather, where]
'''


ATTEMPTS = 2  # of a launch, if it is tried again
# SANDBOX_MAX_IDLE_SECONDS where the next message, if any, waits until the item is stopped.
SHORTLY = "0.2"


class ProviderContract:
    """Subclass as `class Test<Name>Contract(ProviderContract)` in tests/providers/test_<name>.py."""

    core: ClassVar[Core]
    isolated: ClassVar[bool] = True
    """Whether the sandboxes hide the rest of the machine."""
    emulator_host: ClassVar[str] = "127.0.0.1"
    """Where the emulator listens: an address of this machine that sandboxes reach."""

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        """The provider with its sandboxes under `root`. `runner=<path>` must start that file as the runner."""
        raise NotImplementedError

    @pytest.fixture
    def switches(self) -> Switches:
        return Switches()

    @pytest.fixture
    def emulator(self, switches: Switches) -> Iterator[Emulator]:
        with Emulator(host=self.emulator_host, switches=switches) as emulator:
            yield emulator

    @pytest.fixture
    async def world(self, emulator: Emulator, tmp_path: Path) -> AsyncIterator[World]:
        world = World(emulator, self.core, self.make_provider, tmp_path / "sandboxes")
        yield world
        await world.close()

    # --- the main job ------------------------------------------------------------------------------------------------

    async def test_a_session_is_served_from_first_message_to_idle_exit(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS=SHORTLY)
        session = world.emulator.create_session()
        assert await host.ask(session, "!echo hello > greeting.txt && cat greeting.txt") == "hello"
        await host.until_stopped(session)
        assert host.results(session) == [(False, "hello")]
        assert (host.claims(), host.count("work.ack"), host.count("work.stop", 200)) == (1, 1, 1)

    async def test_the_next_message_finds_the_sandbox_and_its_files(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS=SHORTLY)
        session = world.emulator.create_session()
        await host.ask(session, "!echo kept > file.txt")
        await host.until_stopped(session)
        assert await host.ask(session, "!cat file.txt") == "kept"
        assert host.claims() == 2
        assert len([info async for info in host.provider.sandboxes()]) == 1

    async def test_two_messages_in_one_run_need_one_runner(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS="30")
        session = world.emulator.create_session()
        await host.ask(session, "!cd / && x=1")
        assert await host.ask(session, "!pwd; echo $x") == "/\n1"  # the same shell
        assert host.claims() == 1

    async def test_another_sessions_files_are_not_there(self, world: World) -> None:
        host = world.host()
        one, other = world.emulator.create_session(), world.emulator.create_session()
        await host.ask(one, "!echo mine > secret.txt")
        assert "secret.txt" not in await host.ask(other, "!ls -la")

    async def test_a_message_during_the_old_runners_exit_is_served(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS=SHORTLY)
        session = world.emulator.create_session()
        await host.ask(session, "!echo one")
        await host.until_stopped(session)  # its runner is still on its way out
        assert await host.ask(session, "!echo two") == "two"

    # --- acquire (P4) ------------------------------------------------------------------------------------------------

    async def test_acquire_creates_once_and_then_finds(self, world: World) -> None:
        """R10."""
        provider = world.host().provider
        first = await provider.acquire("sesn_contract")
        assert first.created
        again = await provider.acquire("sesn_contract")
        assert (again.id, again.created) == (first.id, False)

    async def test_acquire_at_once_from_two_hosts_makes_one_sandbox(self, world: World) -> None:
        host = world.host()
        found = await asyncio.gather(*(host.provider.acquire("sesn_contract") for _ in range(10)))
        assert len({sandbox.id for sandbox in found}) == 1
        assert len([info async for info in host.provider.sandboxes()]) == 1

    async def test_the_same_item_launched_twice_has_one_runner(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS="30")
        session = world.emulator.create_session()
        world.emulator.say(session, "!echo once")
        rival = world.host(provider=host.provider)
        drained = asyncio.create_task(host.dispatcher.drain())
        await host.until(lambda: host.count("work.poll") > 0)
        world.emulator.advance(RECLAIM_SECONDS)  # offered again while the first launch is under way
        await asyncio.gather(drained, rival.dispatcher.drain())
        assert await host.answer(session) == "once"
        assert (host.claims(), host.results(session)) == (1, [(False, "once")])

    async def test_release_deletes_the_files_and_may_be_repeated(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS=SHORTLY)
        session = world.emulator.create_session()
        await host.ask(session, "!touch file.txt")
        await host.until_stopped(session)
        (info,) = [info async for info in host.provider.sandboxes()]
        await host.provider.release(info.sandbox_id)
        await host.provider.release(info.sandbox_id)
        assert [info async for info in host.provider.sandboxes()] == []
        assert await host.ask(session, "!ls") == "(no output)"

    async def test_the_sweep_deletes_what_nobody_used_for_long(self, world: World) -> None:
        host = world.host(
            SANDBOX_RETENTION_SECONDS="0", SANDBOX_KEEP_WARM_SECONDS="0", SANDBOX_MAX_IDLE_SECONDS=SHORTLY
        )
        session = world.emulator.create_session()
        await host.ask(session, "!touch file.txt")
        await host.until_stopped(session)
        self.let_keep_warm_pass()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while [info async for info in host.provider.sandboxes()] and time.monotonic() < deadline:
            await host.dispatcher.sweep()
            await asyncio.sleep(0.2)
        assert [info async for info in host.provider.sandboxes()] == []

    def let_keep_warm_pass(self) -> None:
        """Where SANDBOX_KEEP_WARM_SECONDS cannot be as short as the test wants it: makes it pass."""

    # --- launches that fail ------------------------------------------------------------------------------------------

    async def test_a_runner_that_cannot_be_executed_leaves_the_item_queued(
        self, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken = world.host(options={"runner": tmp_path / "not_there.py"})
        await self._assert_served_later(world, broken, caplog)

    async def test_a_runner_that_fails_at_import_leaves_the_item_queued(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken = world.host(SANDBOX_TOOLS="no_such_module:tools")
        await self._assert_served_later(world, broken, caplog)

    async def _assert_served_later(self, world: World, broken: Any, caplog: pytest.LogCaptureFixture) -> None:
        session = world.emulator.create_session()
        world.emulator.say(session, "!echo late")
        draining = asyncio.create_task(broken.dispatcher.drain())
        while not draining.done() and caplog.text.count("action=launch_failed") < ATTEMPTS:  # noqa: ASYNC110 - no bell
            await asyncio.sleep(0.05)
        assert "action=launch_failed" in caplog.text
        await broken.dispatcher.close(0)
        assert world.emulator.work(session)["state"] == "queued"
        assert broken.count("work.ack") == 0
        await broken.provider.close()
        world.emulator.advance(RECLAIM_SECONDS)
        host = world.host()
        await host.dispatcher.drain()
        assert await host.answer(session) == "late"

    # --- runners that die --------------------------------------------------------------------------------------------

    async def test_a_runner_killed_in_a_tool_call_is_healed(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS="30")  # the next message finds the second runner
        session = world.emulator.create_session()
        world.emulator.set_script(
            session, [tools(call("bash", command="kill -9 $PPID; sleep 60")), repeat_output, end()]
        )
        world.emulator.say(session, "go")
        await host.dispatcher.drain()
        await host.until_called(session)
        await self._until_no_runner(host, session)
        world.emulator.advance(LAPSE_SECONDS)
        world.emulator.advance(HEALABLE_SECONDS)
        await host.dispatcher.sweep()
        answer = await host.answer(session)
        assert answer.startswith("Error: ")
        assert "lost" in answer
        assert [is_error for is_error, _ in host.results(session)] == [True]  # told once, and not run again
        assert await host.ask(session, "!echo alive") == "alive"

    async def test_sigterm_in_a_tool_call_hands_over(self, world: World) -> None:
        host = world.host()
        session = world.emulator.create_session()
        world.emulator.set_script(
            session,
            [
                tools(call("bash", command="echo one > file.txt; kill -TERM $PPID; sleep 60")),
                tools(call("bash", command="cat file.txt")),
                repeat_output,
                end(),
            ],
        )
        world.emulator.say(session, "go")
        await host.dispatcher.drain()
        await host.until(lambda: len(host.results(session)) == 1)
        await host.dispatcher.drain()
        assert await host.answer(session) == "one"
        (first, second) = host.results(session)
        assert first[0]
        assert "may have taken effect" in first[1]
        assert second == (False, "one")
        assert host.claims() == 2

    async def test_an_operators_graceful_stop_ends_the_tool_and_the_item(self, tmp_path: Path) -> None:
        # A TTL so short that the runner beats, and learns of it, every four seconds.
        with Emulator(host=self.emulator_host, lease_ttl=8) as emulator:
            world = World(emulator, self.core, self.make_provider, tmp_path / "sandboxes")
            host = world.host()
            session = emulator.create_session()
            emulator.set_script(session, [tools(call("bash", command="sleep 60")), say("over"), end()])
            emulator.say(session, "go")
            await host.dispatcher.drain()
            await host.until_called(session)
            assert emulator.stop_work(session)["state"] == "stopping"
            await host.until(lambda: emulator.work(session)["stopped_at"] is not None)
            await world.close()

    async def _until_no_runner(self, host: Any, session: str) -> None:
        """Until the session's event stream has no reader: the runner is gone."""
        sandbox = await host.provider.acquire(session)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while await self.runner_is_alive(sandbox):
            assert time.monotonic() < deadline, "the killed runner is still there"
            await asyncio.sleep(0.05)

    async def runner_is_alive(self, sandbox: Any) -> bool:
        """Whether a runner process is alive in the sandbox."""
        raise NotImplementedError

    # --- what a sandbox may know -------------------------------------------------------------------------------------

    async def test_an_item_without_a_secret_is_refused(self, tmp_path: Path) -> None:
        with Emulator(host=self.emulator_host, switches=Switches(secret="null")) as emulator:
            world = World(emulator, self.core, self.make_provider, tmp_path / "sandboxes")
            host = world.host()
            session = emulator.create_session()
            emulator.say(session, "!echo no")
            await host.dispatcher.drain()
            assert emulator.work(session)["state"] == "queued"
            assert [info async for info in host.provider.sandboxes()] == []
            await world.close()

    async def test_no_credential_is_where_the_agents_shell_can_look(self, world: World) -> None:
        host = world.host()
        session = world.emulator.create_session()
        # The shell's environment, its own and the runner's process, every other process it can see, and what it may
        # read on disk. Where nothing isolates, "every other" would be this whole machine.
        everything = "/proc/[0-9]*" if self.isolated else "/proc/self /proc/$PPID"
        places = ". /tmp /run /etc /opt" if self.isolated else "."
        look = (
            f"env; for p in {everything}; do cat $p/environ $p/cmdline; ls -l $p/fd; done 2>/dev/null | tr '\\0' ' ';"
            f" grep -rIls sk-ant- {places} 2>/dev/null"
        )
        answer = await host.ask(session, f"!{look}; echo; echo end of search")
        assert answer.endswith("end of search")
        assert "sk-ant-" not in answer
        assert world.emulator.environment_key not in answer
        assert "ANTHROPIC_" not in answer

    # --- tool results ------------------------------------------------------------------------------------------------

    async def test_a_large_output_arrives_truncated_and_an_empty_one_arrives(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_IDLE_SECONDS="30")
        session = world.emulator.create_session()
        large = await host.ask(session, "!head -c 1000000 /dev/zero | tr '\\0' x; echo END")
        assert 90_000 < len(large) < 200_000
        assert large.endswith("END")
        assert await host.ask(session, "!true") == "(no output)"

    async def test_a_tool_nobody_here_owns_is_left_to_its_owner(self, world: World) -> None:
        host = world.host()
        session = world.emulator.create_session()
        world.emulator.set_script(
            session, [tools(custom("theirs", x=1), call("bash", command="echo ours")), repeat_output, end()]
        )
        world.emulator.say(session, "go")
        await host.dispatcher.drain()
        await host.until(lambda: len(host.results(session)) == 1)
        (left,) = world.emulator.pending_calls(session)
        result = {
            "type": "user.custom_tool_result",
            "custom_tool_use_id": left,
            "content": [{"type": "text", "text": "theirs answered"}],
        }
        world.emulator.send(session, result)
        assert sorted((await host.answer(session)).splitlines()) == ["ours", "theirs answered"]

    async def test_custom_tools_run_in_the_sandbox(self, world: World, tools_file: Path) -> None:
        host = world.host(SANDBOX_TOOLS=f"{tools_file}:tools", SANDBOX_MAX_IDLE_SECONDS="30")
        session = world.emulator.create_session()
        world.emulator.set_script(
            session, [tools(custom("weather", city="Ghent")), repeat_output, custom("where"), repeat_output, end()]
        )
        world.emulator.say(session, "go")
        await host.dispatcher.drain()
        workdir = await host.answer(session)
        assert host.results(session) == [(False, "sunny in Ghent"), (False, workdir)]
        assert await host.ask(session, f"!cd {shlex.quote(workdir)} && pwd") == workdir

    @pytest.fixture
    def tools_file(self, tmp_path: Path) -> Path:
        """Custom tools as a file the sandbox can read. A subclass puts it where its sandboxes see it."""
        path = tmp_path / "my_tools.py"
        path.write_text(CUSTOM_TOOLS)
        return path
