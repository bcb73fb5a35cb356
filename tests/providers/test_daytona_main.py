"""The Daytona host as a person starts it: baked, served by uvicorn, two at once, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from blockbuster import blockbuster_ctx

from tests.fakes.daytona import DaytonaDouble
from tests.providers.daytona_support import FOLDER, SNAPSHOT, account
from tests.providers.local_support import needs_bubblewrap
from tests.test_copy_out import copy_out
from tools.emulator import Emulator, call, end, repeat_output, tools

pytestmark = needs_bubblewrap
PATIENCE_SECONDS = 60.0
TOLD_TO_END_SECONDS = 25.0
STATUS_KEY = "status-key-of-a-test"


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def daytona(tmp_path: Path) -> Iterator[DaytonaDouble]:
    with account(tmp_path / "daytona") as daytona:
        yield daytona


def environ(emulator: Emulator, daytona: DaytonaDouble, **settings: str) -> dict[str, str]:
    theirs = {
        name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC_", "SANDBOX_", "DAYTONA_"))
    }
    ours = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
        "SANDBOX_MAX_IDLE_SECONDS": "1",
        "DAYTONA_API_KEY": daytona.key,
        "DAYTONA_API_URL": daytona.url,
        "DAYTONA_SNAPSHOT": SNAPSHOT,
        "STATUS_KEY": STATUS_KEY,
    }
    return theirs | ours | settings


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


class Server:
    """A host in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log
        until(self.answers)

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def webhook_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/webhook"

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(OSError):
            return self.ask("/healthz")[0] == 200
        return False

    def end(self, by: signal.Signals = signal.SIGTERM) -> float:
        """Tells it to end; how many seconds it took."""
        began = time.monotonic()
        self.process.send_signal(by)
        self.process.wait(PATIENCE_SECONDS)
        return time.monotonic() - began


@contextlib.contextmanager
def serving(
    env: dict[str, str],
    directory: Path,
    app: str = "main:app",
    *,
    folder: Path = FOLDER.path,
    python: str = sys.executable,
) -> Iterator[Server]:
    """`uvicorn main:app` in the folder."""
    log = directory / f"log-{time.monotonic_ns()}.txt"
    listener = socket.create_server(("127.0.0.1", 0))
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, "-m", "uvicorn", app, "--fd", str(listener.fileno()), "--timeout-graceful-shutdown", "5"],
            cwd=folder,
            env=env,
            pass_fds=[listener.fileno()],
            stdout=output,
            stderr=output,
            text=True,
        )
    port = listener.getsockname()[1]
    listener.close()
    try:
        yield Server(process, port, log)
    finally:
        process.kill()
        process.wait()
        sys.stderr.write(log.read_text(encoding="utf-8"))


def say(emulator: Emulator, command: str) -> str:
    """What a new session's agent says after it ran `command`."""
    session = emulator.create_session()
    emulator.say(session, f"!{command}")
    emulator.wait_idle(session, PATIENCE_SECONDS)
    return str(emulator.events(session, "agent.message"))


def test_a_copy_bakes_its_snapshot_and_serves_a_session_when_a_signed_webhook_arrives(
    emulator: Emulator, daytona: DaytonaDouble, tmp_path: Path
) -> None:
    """The folder alone, with its own lock: `bake.py`, then uvicorn, then a webhook."""
    copy = copy_out(FOLDER.path, tmp_path / "copied")
    (copy.folder / "sandbox_files").mkdir()
    (copy.folder / "sandbox_files" / "hello.txt").write_text("from the image")
    env = environ(emulator, daytona)
    del env["DAYTONA_SNAPSHOT"]
    env = copy.environ(**{name: value for name, value in env.items() if name.startswith(("ANTHROPIC", "DAYTONA"))})
    bake = [str(copy.python), "bake.py"]
    done = subprocess.run(bake, cwd=copy.folder, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "baked sandboxes-" in done.stdout

    # Without polling: once the sweep at the start has looked at the list, only a webhook brings work for a minute.
    (copy.folder / "host.py").write_text("from main import server\n\napp = server.app(poll=False)\n")
    with serving(env, tmp_path, "host:app", folder=copy.folder, python=str(copy.python)) as server:
        emulator.wait_until(lambda: any(each.operation == "work.list" for each in emulator.requests), PATIENCE_SECONDS)
        emulator.set_webhook_url(server.webhook_url)
        assert "from the image 42" in say(emulator, "echo $(cat /opt/sandbox_files/hello.txt) $((6 * 7))")
        assert emulator.deliveries[0].is_ok
        # Said once the launch is over; the runner may have answered before.
        until(lambda: "action=launched" in server.log)
        assert server.end() < TOLD_TO_END_SECONDS
        assert "action=stopped" in server.log
        for secret in (emulator.environment_key, daytona.key, emulator.webhook_key):
            assert secret not in server.log
    (box,) = daytona.existing()
    assert re.fullmatch(r"sandboxes-[0-9a-f]{16}", box.asked["snapshot"])


def test_told_to_end_it_gives_back_what_it_cannot_finish(
    emulator: Emulator, daytona: DaytonaDouble, tmp_path: Path
) -> None:
    daytona.seconds["create"] = 600
    with serving(environ(emulator, daytona), tmp_path) as server:
        session = emulator.create_session()
        emulator.say(session, "!echo late")
        until(daytona.existing)
        assert server.end() < TOLD_TO_END_SECONDS
        assert "action=stopped" in server.log
        assert "Traceback" not in server.log
    assert emulator.work(session)["state"] == "queued"
    assert not [each for each in emulator.requests if each.operation == "work.ack"]


def test_interrupted_it_ends_in_order(emulator: Emulator, daytona: DaytonaDouble, tmp_path: Path) -> None:
    """Ctrl-C is the server's, and not for the event stream of Daytona's client, which would cancel everything."""
    with serving(environ(emulator, daytona), tmp_path) as server:
        until(lambda: daytona.count("list"))
        server.end(signal.SIGINT)
        assert "action=stopped" in server.log


def test_two_replicas_serve_each_session_once_and_one_may_be_killed(
    emulator: Emulator, daytona: DaytonaDouble, tmp_path: Path
) -> None:
    env = environ(emulator, daytona)
    with serving(env, tmp_path) as one, serving(env, tmp_path) as other:
        emulator.set_webhook_url(one.webhook_url)
        sessions = [emulator.create_session() for _ in range(3)]
        for session in sessions:
            command = f"echo {session} >> runs; sleep 1; cat runs"
            emulator.set_script(session, [tools(call("bash", command=command)), repeat_output, end()])
            emulator.say(session, "go")
        until(lambda: daytona.count("session.exec") >= 1)
        one.process.kill()  # the runners go on without it
        for session in sessions:
            if emulator.work(session)["state"] == "queued":
                emulator.advance(121)
            emulator.wait_idle(session, PATIENCE_SECONDS)
            (result,) = emulator.events(session, "user.tool_result")
            assert result["content"][0]["text"].split() == [session]
        assert len(daytona.existing()) == len(sessions)
        assert other.end() < TOLD_TO_END_SECONDS


@contextlib.asynccontextmanager
async def in_process(env: dict[str, str]) -> AsyncIterator[httpx2.AsyncClient]:
    """The application in this process, and a client of it."""
    server = FOLDER.module("main").server
    app = server.app(server.open(env))
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://host")
    async with app.router.lifespan_context(app), client:
        yield client


async def test_the_status_page_is_for_who_has_the_key(
    emulator: Emulator, daytona: DaytonaDouble, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with in_process(environ(emulator, daytona)) as client:
        await asyncio.to_thread(say, emulator, "echo served")
        await asyncio.to_thread(until, lambda: "action=launched" in caplog.text)  # later than what the runner did
        for given in ({}, {"authorization": "Bearer wrong"}, {b"authorization": "Bearer é".encode("latin-1")}):
            assert (await client.get("/status", headers=given)).status_code == 401
        key = {"authorization": f"Bearer {STATUS_KEY}"}
        answer = await client.get("/status", headers=key)
        assert answer.status_code == 200
        shown = answer.json()
        assert shown["queue"]["depth"] == 0
        assert [sandbox["running"] for sandbox in shown["sandboxes"]] == [True]
        assert any("action=launched" in line for line in shown["log"])
        for secret in (emulator.environment_key, daytona.key, emulator.webhook_key, STATUS_KEY):
            assert secret not in answer.text
        daytona.key = "dtn_changed"
        shown = (await client.get("/status", headers=key)).json()
        assert (shown["sandboxes"], shown["queue"]["depth"]) == (None, 0)  # it says what it can


async def test_the_status_page_waits_for_nobody_for_long(
    emulator: Emulator, daytona: DaytonaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_process(environ(emulator, daytona)) as client:
        await asyncio.to_thread(until, lambda: daytona.count("list"))
        emulator.fault("work.stats", "delay", None, seconds=3600.0)
        monkeypatch.setattr(FOLDER.shared("server"), "STATUS_SECONDS", 4.0)
        async with asyncio.timeout(25.0):  # the client's own patience with one call is 30 s
            shown = (await client.get("/status", headers={"authorization": f"Bearer {STATUS_KEY}"})).json()
        assert (shown["sandboxes"], shown["queue"]) == ([], None)
        emulator.clear_faults()


async def test_without_a_key_there_is_no_status_page_and_a_stranger_gets_nothing(
    emulator: Emulator, daytona: DaytonaDouble
) -> None:
    async with in_process(environ(emulator, daytona, STATUS_KEY="")) as client:
        assert (await client.get("/status", headers={"authorization": "Bearer "})).status_code == 404
        assert (await client.get("/webhook")).status_code == 405
        assert (await client.post("/webhook")).status_code == 401
        assert [(await client.get(path)).status_code for path in ("/", "/docs", "/openapi.json")] == [404] * 3


@pytest.mark.parametrize(
    "arguments", [["main.py"], ["-m", "uvicorn", "main:app", "--port", "0"]], ids=["own", "uvicorn"]
)
def test_every_missing_setting_is_named(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 2
    for name in ("ANTHROPIC_ENVIRONMENT_ID", "ANTHROPIC_ENVIRONMENT_KEY", "DAYTONA_API_KEY"):
        assert f"{name} is not set" in done.stderr
    assert "Traceback" not in done.stderr


async def test_nothing_blocks_the_loop(
    emulator: Emulator, daytona: DaytonaDouble, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a launch nor the status page does: what would block is refused."""
    caplog.set_level(logging.INFO)
    ours = [FOLDER.module(name) for name in ("main", "sandbox", "_shared")]
    async with in_process(environ(emulator, daytona)) as client:
        with blockbuster_ctx(scanned_modules=ours):
            await asyncio.to_thread(say, emulator, "echo served")
            await asyncio.to_thread(until, lambda: "action=launched" in caplog.text)
            status = await client.get("/status", headers={"authorization": f"Bearer {STATUS_KEY}"})
            assert status.status_code == 200
    assert "Blocking" not in caplog.text
