"""The local host as a person starts it: its command line, its server, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.folders import load_folder
from tests.providers.local_support import LOCAL, processes
from tools.emulator import Emulator, call, end, repeat_output, tools

PATIENCE_SECONDS = 60.0


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.mark.parametrize("folder", ["local", "docker", "daytona"])
@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_what_is_no_port_is_refused_in_one_line(
    folder: str, port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", f"--port={port}"])
    with pytest.raises(SystemExit) as end:
        load_folder(folder).module("main").server.main()
    assert end.value.code == 2
    assert f"argument --port: invalid port value: '{port}'" in capsys.readouterr().err.splitlines()[-1]


def environ(emulator: Emulator, tmp_path: Path, **settings: str) -> dict[str, str]:
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC_", "SANDBOX_"))}
    ours = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
        "SANDBOX_MAX_IDLE_SECONDS": "1",
        "LOCAL_ROOT": str(tmp_path / "sandboxes"),
        "ALLOW_UNISOLATED_TOOLS": "true",
    }
    return theirs | ours | settings


def failed_start(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A start that is expected to fail at once."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=LOCAL.path, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


class Server:
    """`main.py` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        assert process.stdout is not None
        ready = re.match(r"listening on http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())
        assert ready, self.log
        self.port = int(ready[1])

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> int:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, headers or {})
            return connection.getresponse().status

    def end(self, number: signal.Signals) -> int:
        os.killpg(self.process.pid, number)  # to all of the group, as a terminal's Ctrl-C
        return self.process.wait(PATIENCE_SECONDS)


@contextlib.contextmanager
def serving(emulator: Emulator, tmp_path: Path, *arguments: str, **settings: str) -> Iterator[Server]:
    log = tmp_path / "log.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "main.py", "--port", "0", *arguments],
            cwd=LOCAL.path,
            env=environ(emulator, tmp_path, **settings),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        yield Server(process, log)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_ends_in_order_with_a_tool_under_way(
    emulator: Emulator, tmp_path: Path, number: signal.Signals
) -> None:
    with serving(emulator, tmp_path) as server:
        session = emulator.create_session()
        emulator.set_script(session, [tools(call("bash", command="touch started; sleep 60")), repeat_output, end()])
        emulator.say(session, "go")
        started = tmp_path / "sandboxes" / emulator.environment_id / session / "workspace" / "started"
        until(started.exists)
        assert server.end(number) == 0
        assert processes(str(tmp_path)) == []
        (result,) = emulator.events(session, "user.tool_result")
        assert result["is_error"]
        assert "action=stopped" in server.log
        assert "Traceback" not in server.log


def test_a_stranger_gets_nothing(emulator: Emulator, tmp_path: Path) -> None:
    with serving(emulator, tmp_path, "--no-poll") as server:
        until(lambda: "action=sweep" in server.log)  # the first one, at the start
        polls = [record.operation for record in emulator.requests].count("work.poll")
        assert server.ask("GET", "/healthz") == 200
        assert [server.ask(method, "/webhook") for method in ("GET", "PUT", "DELETE", "OPTIONS")] == [405] * 4
        signature = {"webhook-id": "msg_1", "webhook-timestamp": "1", "webhook-signature": "v1,AAAA"}
        assert server.ask("POST", "/webhook", body=b"{}") == 401
        assert server.ask("POST", "/webhook", signature, b"{}") == 401
        assert server.ask("POST", "/webhook", signature, b"x" * 100_000) == 413
        assert [server.ask("GET", path) for path in ("/", "/docs", "/openapi.json")] == [404] * 3
        assert [record.operation for record in emulator.requests].count("work.poll") == polls
        assert server.end(signal.SIGTERM) == 0


def test_any_asgi_server_can_serve_it(emulator: Emulator, tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "main:app", "--fd", str(listener.fileno())],
        cwd=LOCAL.path,
        env=environ(emulator, tmp_path),
        pass_fds=[listener.fileno()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        emulator.set_webhook_url(f"http://127.0.0.1:{listener.getsockname()[1]}/webhook")
        session = emulator.create_session()
        emulator.say(session, "!echo served")
        emulator.wait_idle(session, PATIENCE_SECONDS)
        assert "served" in str(emulator.events(session, "agent.message"))
        process.terminate()
        process.wait(PATIENCE_SECONDS)
        assert processes(str(tmp_path)) == []
    finally:
        listener.close()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "arguments", [["main.py"], ["-m", "uvicorn", "main:app", "--port", "0"]], ids=["own", "uvicorn"]
)
def test_every_missing_setting_is_named(tmp_path: Path, arguments: list[str]) -> None:
    done = failed_start(arguments, {"PATH": os.environ["PATH"], "LOCAL_ROOT": str(tmp_path)})
    assert done.returncode == 2
    assert "ANTHROPIC_ENVIRONMENT_ID is not set" in done.stderr
    assert "ANTHROPIC_ENVIRONMENT_KEY is not set" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["main.py"], ["-m", "_shared.worker"]], ids=["server", "poller"])
def test_where_nothing_isolates_it_does_not_start(emulator: Emulator, tmp_path: Path, arguments: list[str]) -> None:
    env = environ(emulator, tmp_path, ALLOW_UNISOLATED_TOOLS="false", PATH=str(tmp_path))
    done = failed_start(arguments, env)
    assert done.returncode == 2
    for words in ("bwrap is not installed", "apt-get install bubblewrap", "ALLOW_UNISOLATED_TOOLS=true"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert emulator.requests == []


def test_a_port_that_is_taken_is_named(emulator: Emulator, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = failed_start(["main.py", "--port", port], environ(emulator, tmp_path))
    assert done.returncode == 2
    assert "Address already in use" in done.stderr


def test_without_its_sweep_the_server_ends(emulator: Emulator, tmp_path: Path) -> None:
    """A bug in the background would otherwise leave a server that answers and never works."""
    program = textwrap.dedent("""
        import dataclasses, os, sys
        import uvicorn
        from _shared import log
        from main import server

        class Broken:
            name = "broken"
            def sandboxes(self):
                raise ZeroDivisionError
            async def close(self):
                pass

        log.configure()
        host = dataclasses.replace(server.open(os.environ), provider=Broken())
        uvicorn.run(server.app(host), port=0, log_config=None)
    """)
    done = failed_start(["-c", program], environ(emulator, tmp_path))
    assert done.returncode == -signal.SIGTERM
    assert "action=failed error=ZeroDivisionError" in done.stderr
