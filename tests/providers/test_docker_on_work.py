"""`on-work`, as the vendor's poller calls it. That poller cannot be had here: a stand-in does what its documentation
says (polls, acks, runs the script with the item on standard input, and stops the item when the script has ended)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anthropic
import pytest

from tests.clients.toolchains import INSTALL_SECONDS
from tests.providers import docker_support as support
from tests.providers.docker_support import DOCKER, FOLDER, docker, needs_docker, until
from tools.emulator import Emulator, Switches, call, end, tools

pytestmark = needs_docker


@pytest.fixture
def switches() -> Switches:
    return Switches()


@pytest.fixture
def emulator(switches: Switches) -> Iterator[Emulator]:
    support.image()
    with Emulator(host=support.gateway(), switches=switches) as emulator:
        yield emulator
        support.remove_all(emulator.environment_id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder with a `.venv` in it, as its README has it; the code is linked, not copied."""
    folder = tmp_path / "docker"
    folder.mkdir()
    for path in FOLDER.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return folder


@contextlib.asynccontextmanager
async def on_work(emulator: Emulator, folder: Path, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The script, with the next item; when it has ended, the item is stopped."""
    client = anthropic.AsyncAnthropic(auth_token=emulator.environment_key, base_url=emulator.url)
    work = client.beta.environments.work
    item = await work.poll(emulator.environment_id)
    assert item is not None
    await work.ack(item.id, environment_id=emulator.environment_id)
    environ = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_SESSION_ID": item.data.id,
        "ANTHROPIC_WORK_ID": item.id,
        "ANTHROPIC_BASE_URL": emulator.url,
        "DOCKER_IMAGE": support.image(),
        "SANDBOX_MAX_IDLE_SECONDS": "1",
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        **settings,
    }
    process = await asyncio.create_subprocess_exec(str(folder / "on-work"), env=environ, stdin=-1, stderr=-1)
    assert process.stdin is not None
    process.stdin.write(item.to_json().encode())
    process.stdin.close()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        with contextlib.suppress(anthropic.ConflictError):  # the runner has stopped it already
            await work.stop(item.id, environment_id=emulator.environment_id, force=True)
        await client.close()


async def test_it_serves_the_item_and_stays_until_it_is_served(emulator: Emulator, folder: Path) -> None:
    session = emulator.create_session()
    emulator.say(session, "!sleep 1; echo the answer is $((6 * 7))")
    async with on_work(emulator, folder) as process:
        _, said = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, said
        assert "the answer is 42" in str(emulator.events(session, "agent.message"))
        assert emulator.work(session)["state"] == "stopped"  # by its runner, after the turn
    assert emulator.environment_key not in docker("inspect", f"sandbox-{emulator.environment_id}-{session}")


async def test_told_to_stop_it_lets_the_runner_hand_over(emulator: Emulator, folder: Path) -> None:
    session = emulator.create_session()
    emulator.set_script(session, [tools(call("bash", command="touch began; sleep 60")), end()])
    emulator.say(session, "go")
    async with on_work(emulator, folder) as process:
        name = f"sandbox-{emulator.environment_id}-{session}"

        async def began() -> str:
            return docker("exec", name, "sh", "-c", "ls began", check=False)

        await until(began)
        process.terminate()
        _, said = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 143, said
    (result,) = emulator.events(session, "user.tool_result")
    assert "may have taken effect" in str(result["content"])
    assert docker("ps", "-q", "--filter", f"name={name}") == ""


@pytest.mark.timeout(INSTALL_SECONDS)  # the first run builds
async def test_ant_may_be_the_runner_too(emulator: Emulator, folder: Path) -> None:
    session = emulator.create_session()
    emulator.say(session, "!echo the answer is $((6 * 7))")
    async with on_work(emulator, folder, DOCKER_RUNNER="ant", DOCKER_IMAGE=support.image_with_ant()) as process:
        _, said = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, said
    assert "the answer is 42" in str(emulator.events(session, "agent.message"))


if ANT := os.environ.get("ANT"):

    @contextlib.asynccontextmanager
    async def polling(emulator: Emulator, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
        """The vendor's own poller, which calls the script."""
        environ = {
            "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
            "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
            "ANTHROPIC_BASE_URL": emulator.url,
            "DOCKER_IMAGE": support.image(),
            "SANDBOX_MAX_IDLE_SECONDS": "1",
            "PATH": os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        argv = [str(ANT), "beta:worker", "poll", "--on-work", str(folder / "on-work")]
        process = await asyncio.create_subprocess_exec(*argv, env=environ, cwd=folder, stderr=-1)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def test_the_vendors_poller_serves_one_session_after_another(emulator: Emulator, folder: Path) -> None:
        sessions = [emulator.create_session() for _ in range(2)]
        for session in sessions:
            emulator.say(session, "!echo the answer is $((6 * 7))")
        async with polling(emulator, folder):
            for session in sessions:
                await asyncio.to_thread(emulator.wait_idle, session, 60)
                assert "the answer is 42" in str(emulator.events(session, "agent.message"))

    async def test_the_vendors_poller_passes_a_stop_on(emulator: Emulator, folder: Path) -> None:
        session = emulator.create_session()
        emulator.set_script(session, [tools(call("bash", command="touch began; sleep 60")), end()])
        emulator.say(session, "go")
        async with polling(emulator, folder) as process:
            name = f"sandbox-{emulator.environment_id}-{session}"

            async def began() -> str:
                return docker("exec", name, "sh", "-c", "ls began", check=False)

            await until(began)
            process.terminate()
            _, said = await asyncio.wait_for(process.communicate(), 60)
            assert b"143" in said  # what the script ended with
        (result,) = emulator.events(session, "user.tool_result")
        assert "may have taken effect" in str(result["content"])
        assert docker("ps", "-q", "--filter", f"name={name}") == ""


@pytest.mark.parametrize("switches", [Switches(secret="null")])
async def test_an_item_without_a_secret_is_refused(emulator: Emulator, folder: Path) -> None:
    session = emulator.create_session()
    emulator.say(session, "!echo no")
    async with on_work(emulator, folder) as process:
        _, said = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 1
        assert b"the item carries no usable secret" in said
    assert docker("ps", "-aq", "--filter", f"label=sandboxes.environment={emulator.environment_id}") == ""


async def test_what_is_no_item_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"ANTHROPIC_ENVIRONMENT_ID": "env_x", "ANTHROPIC_ENVIRONMENT_KEY": "k"}
    assert await DOCKER.module("on_work").run(b"{", environ) == 64
    assert "the work item on standard input cannot be read" in caplog.text
    assert await DOCKER.module("on_work").run(b"{}", {}) == 2
    assert "ANTHROPIC_ENVIRONMENT_ID" in caplog.text
