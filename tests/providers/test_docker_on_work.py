"""`on-work`, as the vendor's poller calls it. That poller cannot be had here: a stand-in does what its documentation
says (polls, acks, runs the script with the item on standard input, and stops the item when the script has ended)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

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


class _Answers:
    """A provider that says one thing after another of a session's runner."""

    name = "docker"

    def __init__(self, *answers: bool | Exception) -> None:
        self._answers = iter(answers)

    async def has_runner(self, session_id: str) -> bool:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def until_runners_end(self, session_id: str) -> None:
        hours_pass()  # more than the Engine may be away
        raise AWAY


AWAY = DOCKER.shared("errors").LaunchFailed("the Docker Engine broke off", retriable=True)


def hours_pass() -> None:
    loop = asyncio.get_running_loop()
    later = loop.time() + 10_000 - time.monotonic()
    loop.time = lambda: time.monotonic() + later  # type: ignore[method-assign]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOCKER.module("on_work"), "PAUSE_SECONDS", 0.001)


async def test_connections_that_break_again_and_again_do_not_end_it(impatient: None) -> None:
    await DOCKER.module("on_work").until_served(_Answers(AWAY, True, True, AWAY, True, False), "sesn_1")


async def test_an_engine_that_stays_away_ends_it(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOCKER.module("on_work"), "ENGINE_SECONDS", 0.05)
    with pytest.raises(DOCKER.shared("errors").LaunchFailed, match="broke off"):
        await DOCKER.module("on_work").until_served(_Answers(True, *[AWAY] * 10_000), "sesn_1")


class _Engine:
    """An Engine that answers a command in a container with these lines, and knows the container in this state."""

    def __init__(self, lines: list[bytes], running: bool | None) -> None:
        self._lines, self._running = lines, running

    async def execute(self, container_id: str, argv: list[str], stdin: bytes) -> AsyncIterator[bytes]:
        for line in self._lines:
            yield line

    async def container(self, name: str) -> dict[str, Any] | None:
        return None if self._running is None else {"State": {"Running": self._running}}


@pytest.mark.parametrize(
    ("lines", "running", "expected"),
    [
        ([b'{"stopping": false, "runners": 1}'], True, True),
        ([b'{"stopping": false, "runners": 0}'], True, False),
        ([], True, True),  # the Engine was started again in the middle of it
        ([b"OCI runtime exec failed: exec failed: resource temporarily unavailable"], True, True),  # no process is left
        ([], False, False),
        ([], None, False),
    ],
)
async def test_a_sandbox_that_runs_and_does_not_answer_may_have_a_runner(
    lines: list[bytes], running: bool | None, expected: bool
) -> None:
    provider = DOCKER.sandbox.DockerProvider(
        _Engine(lines, running), namespace="env_1", base_url="https://api.anthropic.com"
    )
    assert await provider.has_runner("sesn_1") is expected


async def test_a_paused_sandbox_is_waited_for() -> None:
    sandboxes = support.Sandboxes()
    try:
        sandbox, _ = await sandboxes.begin("sesn_1", "true", linger=True)
        docker("pause", sandbox.id)
        assert await sandboxes.provider.has_runner("sesn_1")
        docker("unpause", sandbox.id)
        assert await sandboxes.provider.has_runner("sesn_1")
        docker("rm", "-f", sandbox.id)
        assert not await sandboxes.provider.has_runner("sesn_1")
    finally:
        await sandboxes.close()


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


def test_on_work_without_its_environment_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "on-work").write_bytes((FOLDER / "on-work").read_bytes())
    done = subprocess.run(["/bin/sh", str(tmp_path / "on-work")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run uv sync --frozen" in done.stderr


def test_on_work_says_what_it_is() -> None:
    command = [sys.executable, "on_work.py", "--help"]
    done = subprocess.run(
        command, cwd=DOCKER.path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "ant beta:worker poll --on-work" in done.stdout
    assert "The work item is read from standard input" in done.stdout
