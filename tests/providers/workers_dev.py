"""A Workers folder under `wrangler dev`: real workerd on this machine, fed by the emulator, no account."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import httpx2
import pytest

from tools import typescript
from tools.emulator import Emulator, RequestRecord
from tools.sync_shared import ROOT

START_SECONDS = 120.0
WAIT_SECONDS = 60.0
STOP_SECONDS = 60.0
SWEEP_PATH = "/cdn-cgi/handler/scheduled"


def workspace(name: str) -> Path:
    """The folder's copy with its npm packages; without npm the test fails on CI and skips elsewhere."""
    try:
        return typescript.workspace(ROOT / "providers" / name)
    except typescript.ToolchainMissing as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def settings_for(emulator: Emulator, **more: str) -> dict[str, str]:
    """What a Worker needs to serve the emulator's environment. It waits shortly for a next message."""
    return {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
        "SANDBOX_MAX_IDLE_SECONDS": "0.2",
        **more,
    }


class WorkersDev:
    """One `wrangler dev`, which can be killed and started again on the same storage."""

    def __init__(self, folder: Path, directory: Path, settings: dict[str, str] | None, **environ: str) -> None:
        """Runs `folder`; its state and its log are kept in `directory`. Without settings it has those of its `.env`."""
        self._folder = folder
        self._environ = environ
        self._directory = directory
        self._log = directory / "log.txt"
        self._log.touch()
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._env_file: list[str] = []
        if settings is not None:
            self._env_file = ["--env-file", str(directory / "settings")]
            (directory / "settings").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def log(self) -> str:
        """All that was printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once it answers. The second time it listens where it did the first time."""
        said = len(self.log)
        argv = [typescript.program(self._folder, "wrangler"), "dev", "--ip", "127.0.0.1", "--port", str(self._port)]
        argv += ["--inspector-port", "0", "--live-reload=false", *self._env_file]
        argv += ["--persist-to", str(self._directory / "state"), "--show-interactive-dev-session=false"]
        argv += self.arguments()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                cwd=self._folder,
                env=typescript.environment() | self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with contextlib.ExitStack() as unless_ready:
            unless_ready.callback(self.kill)  # whoever started it has nothing yet that it could stop
            self._port = self._wait_until_ready(said)
            unless_ready.pop_all()

    def _wait_until_ready(self, said: int) -> int:
        """The port where it listens."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not (ready := re.search(r"Ready on http://127\.0\.0\.1:(\d+)", self.log[said:])):
            assert self._process.poll() is None, self.log[said:]
            assert time.monotonic() < deadline, self.log[said:]
            time.sleep(0.05)
        answer = httpx2.get(f"http://127.0.0.1:{ready[1]}/healthz", timeout=WAIT_SECONDS)
        assert answer.status_code == 200, answer.text
        return int(ready[1])

    def arguments(self) -> list[str]:
        """More of them for wrangler."""
        return []

    def kill(self) -> None:
        """At once, as a machine dies: nothing is written any more."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        group = process.pid  # of a session of its own: wrangler and its workerd, nobody else
        os.killpg(group, number)
        try:
            process.wait(STOP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)  # a workerd that outlived its wrangler

    def request(self, method: str, path: str, **options: object) -> httpx2.Response:
        return httpx2.request(method, f"{self.url}{path}", timeout=WAIT_SECONDS, **options)  # type: ignore[arg-type]

    def sweep(self) -> None:
        """What the cron trigger does each minute. Returns when it is done."""
        assert self.request("GET", SWEEP_PATH, params={"cron": "* * * * *"}).status_code == 200

    def until_logged(self, pattern: str, since: int = 0) -> str:
        """Waits for a line, and returns what matched."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := re.search(pattern, self.log[since:])):
            assert time.monotonic() < deadline, f"{pattern} was not logged:\n{self.log[since:]}"
            time.sleep(0.02)
        return found[0]


class Seen:
    """What the emulator knows of one session."""

    def __init__(self, emulator: Emulator, session: str) -> None:
        self._emulator = emulator
        self.session = session
        self._work_id: str | None = None

    def wait_idle(self) -> str:
        """Until the turn is over; what the agent said last, if anything."""
        self.wait_until(lambda: self._emulator.is_in(self.session, "idle"))
        said = self._emulator.events(self.session, "agent.message")
        return str(said[-1]["content"][0]["text"]) if said else ""

    def wait_stopped(self) -> None:
        self.wait_until(lambda: self.state == "stopped")

    def wait_until(self, predicate: Callable[[], object]) -> None:
        """Woken by the emulator's changes. A wait in vain ends with what was asked about the session."""
        try:
            self._emulator.wait_until(predicate, WAIT_SECONDS)
        except TimeoutError:
            asked = [
                f"{record.at:%H:%M:%S.%f} {record.operation} {record.status} {record.fault or ''}"
                for record in self._emulator.requests
                if self.session in record.path or record.operation == "work.poll"
            ]
            kinds = [event["type"] for event in self._emulator.events(self.session)]
            raise AssertionError("\n".join([f"item {self.state}", *asked[-50:], *kinds[-15:]])) from None

    @property
    def state(self) -> str:
        return str(self._emulator.work(self.session)["state"])

    def results(self) -> list[tuple[bool, str]]:
        """(is_error, text) of every tool result in the session's log."""
        return [
            (bool(event.get("is_error")), "".join(block.get("text", "") for block in event.get("content") or []))
            for event in self._emulator.events(self.session, "user.tool_result", "user.custom_tool_result")
        ]

    def requests(self, operation: str) -> list[RequestRecord]:
        """Those that name the session or its work item."""
        ids = {self.session, self._emulator.work(self.session)["id"]}
        return [
            record
            for record in self._emulator.requests
            if record.operation == operation and any(each in record.path for each in ids)
        ]

    def claims(self) -> int:
        """First heartbeats that were answered 200."""
        beats = self.requests("work.heartbeat")
        return sum(b.status == 200 and b.query.get("expected_last_heartbeat") == ["NO_HEARTBEAT"] for b in beats)
