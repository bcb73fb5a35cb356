"""The contract on the Modal provider: Modal's real client, against the double."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib import Status
from modal_proto import api_pb2 as api

from tests.contract import CUSTOM_TOOLS, ProviderContract
from tests.fakes.modal import ModalDouble
from tests.providers.modal_support import MODAL, image, needs_bubblewrap, open_provider, until
from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, RECLAIM_SECONDS, World
from tools.emulator import call, custom, end, repeat_output, tools


@needs_bubblewrap
class TestModalContract(ProviderContract):
    core = MODAL

    @pytest.fixture(autouse=True)
    def double(self, tmp_path: Path) -> Iterator[ModalDouble]:
        with ModalDouble() as double:
            self._double = double
            custom_tools = tmp_path / "my_tools.py"
            custom_tools.write_text(CUSTOM_TOOLS)
            ours = MODAL.path / "tools/inventory.py"
            self._image = image(double, {"/opt/tools/my_tools.py": custom_tools, "/opt/tools/inventory.py": ours})
            yield double
            assert double.wire.refused == []

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        return open_provider(self._double, self._image, settings, **options)

    async def runner_is_alive(self, sandbox: Any) -> bool:
        return any(not each.is_idle() for each in self._double.running())

    @pytest.fixture
    def tools_file(self) -> Path:
        return Path("/opt/tools/my_tools.py")

    # --- what goes wrong at Modal ------------------------------------------------------------------------------------

    async def test_a_sandbox_that_is_lost_in_a_tool_call_is_healed_and_its_files_are_there(self, world: World) -> None:
        host = world.host()
        session = world.emulator.create_session()
        command = "echo kept > file.txt; sleep 60"
        world.emulator.set_script(session, [tools(call("bash", command=command)), repeat_output, end()])
        world.emulator.say(session, "go")
        await host.dispatcher.drain()
        await host.until_called(session)
        (sandbox,) = self._double.running()
        root = self._double.volume(MODAL.sandbox.VOLUME).root
        await until(lambda: list(root.glob("*/*/file.txt")))
        await self._double.on_its_loop(self._double.control.end(sandbox))
        world.emulator.advance(LAPSE_SECONDS)
        world.emulator.advance(HEALABLE_SECONDS)
        await host.dispatcher.sweep()
        assert "lost" in await host.answer(session)
        assert await host.ask(session, "!cat file.txt") == "kept"
        assert len(self._double.state.sandboxes) == 2

    async def test_a_sandbox_at_the_end_of_its_lifetime_hands_its_session_to_the_next(self, world: World) -> None:
        options = {"SANDBOX_LIFETIME_SECONDS": "600", "handover_seconds": 580.0, "renew_seconds": 0.0}
        host = world.host(options=options)  # the hand-over begins twenty seconds after the sandbox's start
        session = world.emulator.create_session()
        world.emulator.set_script(
            session,
            [
                tools(call("bash", command="echo one > file.txt; sleep 60")),
                tools(call("bash", command="cat file.txt")),
                repeat_output,
                end(),
            ],
        )
        world.emulator.say(session, "go")
        await host.dispatcher.drain()
        await host.until(lambda: len(host.results(session)) == 1)
        await until(lambda: not self._double.running())
        (first,) = self._double.state.sandboxes.values()
        assert first.result is not None
        assert first.result.status == api.GenericResult.GENERIC_STATUS_SUCCESS  # by itself, before Modal's limit
        await world.host().dispatcher.drain()
        assert await host.answer(session) == "one"
        assert [is_error for is_error, _ in host.results(session)] == [True, False]

    @pytest.mark.parametrize(
        ("name", "status", "times"),
        [
            ("SandboxCreateV2", Status.RESOURCE_EXHAUSTED, 2),
            ("SandboxGetFromNameV2", Status.UNAVAILABLE, 12),
            ("TaskExecStart", Status.INTERNAL, 12),
        ],
        ids=["limit reached", "unavailable", "internal error"],
    )
    async def test_a_failure_that_passes_is_outlived_within_the_launch(
        self, world: World, name: str, status: Status, times: int
    ) -> None:
        host = world.host()
        self._double.wire.fail(name, status, times=times)
        assert await host.ask(world.emulator.create_session(), "!echo served") == "served"

    async def test_a_token_that_was_revoked_leaves_the_item_queued(self, world: World) -> None:
        host = world.host()
        session = world.emulator.create_session()
        await host.provider.acquire(session)
        self._double.control.accepts_token = False
        world.emulator.say(session, "!echo late")
        await host.dispatcher.drain()
        assert world.emulator.work(session)["state"] == "queued"
        assert host.count("work.ack") == 0
        self._double.control.accepts_token = True
        world.emulator.advance(RECLAIM_SECONDS)
        await host.dispatcher.drain()
        assert await host.answer(session) == "late"

    async def test_no_more_sandboxes_run_than_the_cap(self, world: World) -> None:
        host = world.host(SANDBOX_MAX_LIVE="1", SANDBOX_KEEP_WARM_SECONDS="0")
        self._double.control.time_scale = 10.0
        one, other = world.emulator.create_session(), world.emulator.create_session()
        assert await host.ask(one, "!echo one") == "one"
        world.emulator.say(other, "!echo other")
        await host.dispatcher.drain()
        assert world.emulator.work(other)["state"] == "queued"
        await until(lambda: not self._double.running())
        for _ in range(2):  # the first one's drain goes by an older count; its list is what the second one's goes by
            await host.dispatcher.sweep()
        assert await host.answer(other) == "other"

    async def test_a_tool_has_a_package_and_a_secret_that_the_agent_cannot_read(self, world: World) -> None:
        """The README's example, `tools/inventory.py`."""
        token = f"token-{uuid.uuid4().hex}"
        with inventory(token) as url:
            self._double.create_secret("inventory", INVENTORY_URL=url, INVENTORY_TOKEN=token)
            options = {"SANDBOX_TOOL_SECRETS": "inventory"}
            host = world.host(SANDBOX_TOOLS="/opt/tools/inventory.py:tools", options=options)
            session = world.emulator.create_session()
            look = (
                "env; for p in /proc/[0-9]*; do cat $p/environ $p/cmdline 2>/dev/null | tr '\\0' ' '; done;"
                " grep -rIls token- /opt /run /tmp /workspace 2>/dev/null; cat /opt/tools/inventory.py | head -1"
            )
            world.emulator.set_script(
                session, [custom("stock", item="bolts"), repeat_output, tools(call("bash", command=look)), end()]
            )
            world.emulator.say(session, "go")
            await host.dispatcher.drain()
            assert (await host.answer(session)).splitlines() == ["bolts: 42"]
        answered, looked = host.results(session)
        assert answered == (False, "bolts: 42\n")
        assert "An example of custom tools" in looked[1]  # the code it can read
        assert token not in looked[1]
        assert "INVENTORY" not in looked[1]
        sent = b"".join(each.request.SerializeToString() for each in self._double.wire.calls)
        assert token.encode() not in sent  # Modal has it, and puts it into the sandbox by itself

    async def test_a_secret_that_does_not_exist_is_no_crash(self, world: World) -> None:
        host = world.host(options={"SANDBOX_TOOL_SECRETS": "no-such-secret"})
        session = world.emulator.create_session()
        world.emulator.say(session, "!echo no")
        draining = asyncio.create_task(host.dispatcher.drain())
        await asyncio.wait([draining], timeout=3)
        await host.dispatcher.close(0)
        assert world.emulator.work(session)["state"] == "queued"


@contextlib.contextmanager
def inventory(token: str) -> Iterator[str]:
    """A service of ours that admits nobody without the token. Its address."""

    class Stock(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            admitted = self.headers.get("authorization") == f"Bearer {token}"
            self.send_response(200 if admitted else 403)
            self.end_headers()
            self.wfile.write(json.dumps({self.path.rpartition("/")[2]: 42}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stock) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()
