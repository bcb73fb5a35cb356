"""The Daytona double, asked over HTTP: what it refuses, and what its sandboxes are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fakes.daytona import DaytonaDouble
from tests.providers.daytona_support import until
from tests.providers.local_support import needs_bubblewrap

pytestmark = needs_bubblewrap
NEW = {"name": "box", "snapshot": "image", "labels": {"app": "test"}}


@pytest.fixture
def daytona(tmp_path: Path) -> Iterator[DaytonaDouble]:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "hello.txt").write_text("from the image")
    with DaytonaDouble(tmp_path / "daytona") as daytona:
        daytona.add_snapshot("image", {"tools": tmp_path / "tools"})
        yield daytona


class Client:
    def __init__(self, daytona: DaytonaDouble, session: aiohttp.ClientSession) -> None:
        self._daytona = daytona
        self._session = session

    async def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key or self._daytona.key}"}
        url = f"{self._daytona.url.removesuffix('/api')}{path}"
        async with self._session.request(method, url, json=body, headers=headers) as answer:
            return answer.status, await answer.json() if answer.content_type == "application/json" else None

    async def new(self, **more: Any) -> str:
        status, box = await self.ask("POST", "/api/sandbox", NEW | more)
        assert status == 200
        return str(box["id"])

    async def run(self, box: str, command: str) -> tuple[int, str]:
        status, answer = await self.ask("POST", f"/toolbox/{box}/process/execute", {"command": command})
        assert status == 200, answer
        return answer["exitCode"], answer["result"]


@pytest.fixture
async def client(daytona: DaytonaDouble) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(daytona, session)


async def test_a_stranger_is_refused_everywhere(daytona: DaytonaDouble, client: Client) -> None:
    box = await client.new()
    for method, path in (("GET", "/api/sandbox"), ("DELETE", f"/api/sandbox/{box}"), ("GET", "/api/snapshots")):
        assert (await client.ask(method, path, key="dtn_wrong"))[0] == 401
    command = {"command": "true"}
    assert (await client.ask("POST", f"/toolbox/{box}/process/execute", command, key="dtn_wrong"))[0] == 401
    assert daytona.box("box").state == "started"


async def test_what_it_does_not_know_is_refused_and_told(daytona: DaytonaDouble, client: Client) -> None:
    box = await client.new()
    assert (await client.ask("POST", f"/api/sandbox/{box}/resize", {"cpu": 2}))[0] == 404
    assert (await client.ask("POST", "/api/sandbox", NEW | {"name": "other", "gpu": 1}))[0] == 400
    assert (await client.ask("POST", f"/toolbox/{box}/process/execute", {"command": "true", "shell": "zsh"}))[0] == 400
    assert (await client.ask("GET", "/api/sandbox?states=started"))[0] == 400
    assert len(daytona.refused) == 4
    with pytest.raises(ValueError, match="no such fault"):
        daytona.fault("invent", "fail")
    with pytest.raises(ValueError, match="no such fault"):
        daytona.fault("create", "stale")


async def test_names_are_unique_until_it_is_deleted(client: Client) -> None:
    box = await client.new()
    assert (await client.ask("POST", "/api/sandbox", NEW))[0] == 409
    assert (await client.ask("DELETE", f"/api/sandbox/{box}"))[0] == 200
    assert (await client.ask("GET", "/api/sandbox/box"))[0] == 404
    assert await client.new() != box


async def test_commands_are_processes_of_an_ordinary_user_with_files_of_their_own(client: Client) -> None:
    one, other = await client.new(), await client.new(name="other")
    assert await client.run(one, "cat /opt/tools/hello.txt; echo x > file; pwd; exit 3") == (
        3,
        "from the image/workspace\n",
    )
    assert (await client.run(other, "ls"))[1] == ""
    code, user = await client.run(one, "id -u; cat /proc/[0-9]*/comm | sort -u | tr '\\n' ' '; touch /opt/x")
    assert code == 1
    assert not user.startswith("0\n")
    assert "uvicorn" not in user


async def test_stopping_kills_and_keeps_the_disk_and_only_a_started_one_runs_commands(
    daytona: DaytonaDouble, client: Client
) -> None:
    box = await client.new()
    await client.run(box, "echo kept > file; sleep 100 > /dev/null 2>&1 &")
    daytona.stop(daytona.box("box"))
    assert (await client.ask("POST", f"/toolbox/{box}/process/execute", {"command": "true"}))[0] == 400
    assert (await client.ask("POST", f"/api/sandbox/{box}/start"))[0] == 200
    assert await client.run(box, "cat file; cat /proc/[0-9]*/comm | grep -c sleep") == (1, "kept\n0\n")


async def test_a_state_refuses_what_it_does_not_allow(daytona: DaytonaDouble, client: Client) -> None:
    daytona.seconds["create"] = 60
    box = await client.new()
    assert (await client.ask("GET", f"/api/sandbox/{box}"))[1]["state"] == "creating"
    assert (await client.ask("POST", f"/api/sandbox/{box}/start"))[0] == 409
    daytona.seconds["create"] = 0
    await until(lambda: daytona.box("box").state == "started")
    assert (await client.ask("POST", f"/api/sandbox/{box}/recover"))[0] == 400
    daytona.kill(daytona.box("box"))
    assert (await client.ask("POST", f"/api/sandbox/{box}/start"))[0] == 400


@pytest.mark.parametrize("quiet", [False, True])
async def test_input_is_echoed_to_the_disk_unless_it_is_told_not_to(
    daytona: DaytonaDouble, client: Client, quiet: bool
) -> None:
    toolbox = f"/toolbox/{await client.new()}/process/session"
    assert (await client.ask("POST", toolbox, {"sessionId": "s"}))[0] == 201
    assert (await client.ask("POST", toolbox, {"sessionId": "s"}))[0] == 409
    command = {"command": "read line; echo got ${#line}; cat", "runAsync": True, "suppressInputEcho": quiet}
    _, started = await client.ask("POST", f"{toolbox}/s/exec", command)
    one = f"{toolbox}/s/command/{started['cmdId']}"
    assert (await client.ask("POST", f"{one}/input", {"data": "secret"}))[0] == 204
    box = daytona.box("box")
    await until(lambda: any("got 6" in path.read_text() for path in box.directory.rglob("stdout")))
    logs = (await client.ask("GET", f"{one}/logs"))[1]
    assert ("secret" in logs["output"]) != quiet
    assert "exitCode" not in (await client.ask("GET", one))[1]  # its input never ends by itself
    on_disk = [path.read_text() for path in box.directory.rglob("*") if path.is_file()]
    assert any("read line" in text for text in on_disk)  # a command is kept there
    assert any("secret" in text for text in on_disk) != quiet
    assert (await client.ask("DELETE", f"{toolbox}/s"))[0] == 204
    assert (await client.ask("GET", one))[0] == 404


async def test_intervals_run_and_activity_puts_them_off(daytona: DaytonaDouble, client: Client) -> None:
    box = await client.new(autoStopInterval=4, autoArchiveInterval=4, autoDeleteInterval=40)
    it = daytona.box("box")
    it.used_at -= 3 * 60
    assert (await client.ask("POST", f"/api/sandbox/{box}/last-activity"))[0] == 201
    it.used_at -= 3 * 60
    assert (await client.ask("GET", f"/api/sandbox/{box}"))[1]["state"] == "started"
    it.used_at -= 60  # as if it had not been used for four minutes
    await until(lambda: it.state == "stopped")
    it.changed_at -= 4 * 60
    await until(lambda: it.state == "archived")
    it.changed_at -= 40 * 60
    await until(lambda: not daytona.existing())


def test_nothing_is_left_running(tmp_path: Path) -> None:
    async def make_one(daytona: DaytonaDouble) -> None:
        async with aiohttp.ClientSession() as session:
            await Client(daytona, session).new()

    with DaytonaDouble(tmp_path / "daytona") as daytona:
        daytona.add_snapshot("image", {})
        asyncio.run(make_one(daytona))
        process = daytona.box("box").process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
